"""The galleries of a report: the recommended plan, its runner-up and the best uniform plan."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from sensitivity.analysis.failures.changes import on_examples_of, study_of
from sensitivity.analysis.failures.gallery import FailureGallery, galleries
from sensitivity.analysis.recommending.recommendation import Recommendation, what_is_lost
from sensitivity.spec.errors import UserError, shell_word
from sensitivity.spec.plan import Plan
from sensitivity.study.study import Study

MAX_PICTURES = 60  # on a page


def failing(study: Study, recommendations: Sequence[Recommendation]) -> tuple[list[FailureGallery], list[str]]:
    """Galleries of the compared plans whose answers are known; without any, a sentence that says why."""
    plans = _plans(study, recommendations)
    if not plans:
        return [], [
            f"What a plan breaks is shown for recommended plans here, and for any other by `sensitivity failures "
            f"{shell_word(study.path)} --plan KEY`; the table above has the keys of the plans on the frontier."
        ]
    measured = [(f"{title}, {where}", plan) for title, plan in plans if (where := _where_answered(study, plan))]
    if measured:
        return galleries(study, measured, MAX_PICTURES // len(plans)), []
    return [], ["The answers of these plans are not known: they were predicted and not run, or imported as a table."]


def _where_answered(study: Study, plan: Plan) -> str:
    """On which examples the answers of a plan are known; empty where they are not."""
    with contextlib.suppress(UserError):
        return on_examples_of(study, study_of(study, plan))
    return ""


def _plans(study: Study, recommendations: Sequence[Recommendation]) -> list[tuple[str, Plan]]:
    """The first budget's recommended plan, the best other candidate, and the best uniform plan, each once."""
    if not recommendations:
        return []
    first = recommendations[0]
    title = "The best plan (of no use)" if what_is_lost(first) else "The recommended plan"
    plans = [(title, first.plan)]
    if first.others:
        plans.append(("The runner-up", max(first.others, key=lambda other: other.score.mean).other))
    if first.uniform is not None:
        plans.append(("The best uniform plan", first.uniform.other))
    return list({plan.key: (title, plan) for title, plan in reversed(plans) if not plan.is_native}.values())[::-1]
