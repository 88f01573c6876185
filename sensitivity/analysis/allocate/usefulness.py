"""Whether a plan is of use: what it keeps of what full precision scores above chance, measured or predicted."""

from __future__ import annotations

from sensitivity.analysis.allocate.recommendation import Recommendation
from sensitivity.study.scores import LEAST_CLUSTERS

NEXT_TO_NOTHING = 0.1  # of what full precision has above chance: a plan that keeps less is not to be used


def what_is_lost(one: Recommendation) -> dict[str, str]:
    """The tasks on which a plan is of no use, each with its score and the reason in words.

    It is of no use where it is not shown to score above chance, or keeps next to nothing of what full precision has
    above it; nor is any plan where full precision itself is at chance. Too few images say nothing.
    """
    levels = (one.provenance.get("verified") or one.provenance.get("study") or {}).get("chance") or {}
    lost = {}
    for task in one.weights:
        kind, score, low, _ = one.score_on(task)
        measured = one.by_task.get(task)
        if measured is not None and measured.clusters < LEAST_CLUSTERS:
            continue
        if why := _reason(score, low, one.full_on(task), levels.get(task) or 0.0):
            lost[task] = f"{'scores' if kind == 'measured' else 'is predicted to score'} {score:.3f} on {task}, {why}"
    return lost


def _reason(score: float, low: float, full: float, chance: float) -> str:
    """Why a score is of no use; an empty string where it is."""
    level = f"chance ({chance:.3f})"
    if 0 < full <= chance:
        return f"where full precision itself scores {full:.3f}, no better than {level}"
    if score <= chance and chance:
        near = f"no better than {level}"
    elif low <= chance and chance:
        near = f"not shown to be better than {level}"
    elif score - chance < NEXT_TO_NOTHING * (full - chance):
        near = f"hardly above {level}" if chance else "next to nothing"
    else:
        return ""
    return f"{near}, where full precision scores {full:.3f}"


def warning(one: Recommendation) -> str:
    """A sentence that a plan which is of no use is not to be used; else an empty string."""
    lost = what_is_lost(one)
    return f" Do not use it: it {' and '.join(lost.values())}." if lost else ""
