"""The types of a published study's row: the model, the tasks, the plans, and the scores that were published."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensitivity.spec.components import PARTS, ComponentMap
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.trial import NATIVE


@dataclass(frozen=True)
class PublishedScore:
    """One score that was published for one plan."""

    plan: Mapping[str, int]  # patterns over component names -> bits; empty is full precision
    value: float
    metric: str = ""  # one of the task's further metrics; empty for the task's own score
    task: int = 0  # index into the study's tasks
    half_width: float | None = None  # half of the 95 % interval; None where no interval was published


@dataclass(frozen=True)
class PublishedStudy:
    """One row of a paper's table: what is run, and what the paper reports about it."""

    title: str
    source: str
    model: str
    small: str  # the model of experiments/small/models.py that replaces it in a smoke run
    tasks: tuple[str, ...]  # as `sensitivity sweep --task` takes them, with {data} for the folder
    method: str
    unit: str = ""  # what the paper calls the score
    grid: Mapping[str, tuple[int, ...]] | None = None  # all combinations of these bit widths of these parts
    one_at_a_time: tuple[int, ...] = ()  # instead of a grid: each component alone at these bit widths
    by: str = "part"
    n: int = 1000
    scale: float = 1.0  # published scores are this many times ours: 100 where they are percentages
    scores: tuple[PublishedScore, ...] = ()
    intervals: str = ""  # where the published scores' intervals come from
    shares: Mapping[str, Mapping[str, float]] | None = None  # metric, or empty for the score -> part -> importance, %
    caveats: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # what was published and is not run here, and why
    dtype: str | None = None

    def plans(self, parts: ComponentMap, scheme_of: Mapping[int, Scheme]) -> list[Plan]:
        """Full precision, then the plans with a published score, then the grid."""
        choices: list[Mapping[str, int]] = [{}, *(score.plan for score in self.scores)]
        if self.grid:
            choices += [dict(zip(self.grid, row, strict=True)) for row in itertools.product(*self.grid.values())]
        choices += [{name: width} for name in parts.names for width in self.one_at_a_time]
        return list(dict.fromkeys(plan_of(parts, choice, scheme_of) for choice in choices))

    @property
    def widths(self) -> list[int]:
        """Every bit width that some plan uses, full precision aside."""
        used = {width for score in self.scores for width in score.plan.values()} | set(self.one_at_a_time)
        used |= {width for widths in (self.grid or {}).values() for width in widths}
        return sorted(used - {NATIVE})


def alone(pattern: str, values: Mapping[int, float], **more: Any) -> tuple[PublishedScore, ...]:
    """Scores by bit width of the components that match the pattern, all others at native precision."""
    return tuple(PublishedScore({pattern: width}, value, **more) for width, value in values.items())


def mixed(values: Mapping[tuple[int, ...], float], **more: Any) -> tuple[PublishedScore, ...]:
    """Scores by the bit widths of vision, connector and language model."""
    return tuple(
        PublishedScore(dict(zip(PARTS, widths, strict=False)), value, **more) for widths, value in values.items()
    )


def plan_of(parts: ComponentMap, choice: Mapping[str, int], scheme_of: Mapping[int, Scheme]) -> Plan:
    return Plan.of(parts, {pattern: scheme_of.get(width) for pattern, width in choice.items()})
