"""What an experiment declares: the model, the tasks, the plans, and the published figures that ours stand beside."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensitivity.components import PARTS, ComponentMap
from sensitivity.plan import Plan, Scheme
from sensitivity.trials import NATIVE


@dataclass(frozen=True)
class Figure:
    """One published figure: a plan (patterns over components -> bits; empty is full precision), a metric, a value."""

    plan: Mapping[str, int]
    value: float
    metric: str = ""  # one of the task's further metrics; empty for its score
    of: int = 0  # which of the experiment's tasks
    half: float | None = None  # half the width of its 95 % interval; None where none was published


@dataclass(frozen=True)
class Experiment:
    """What is run, and what was published about it."""

    title: str
    source: str
    model: str
    small: str  # which small model stands in for it in a smoke run
    tasks: tuple[str, ...]  # as --task takes them, with {data} for the folder
    method: str
    unit: str = ""  # what the score is called where it is published
    grid: Mapping[str, tuple[int, ...]] | None = None  # all combinations of these widths of these parts
    alone: tuple[int, ...] = ()  # or: each component alone at these widths
    by: str = "part"
    n: int = 1000
    scale: float = 1.0  # published figures are this many times ours: 100 where they are per cent
    figures: tuple[Figure, ...] = ()
    spread: str = ""  # where the published figures' interval comes from
    shares: Mapping[str, Mapping[str, float]] | None = None  # metric, or empty for the score: shares of the parts, %
    traps: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # what was published and is not run here, and why
    dtype: str | None = None

    def plans(self, parts: ComponentMap, scheme_of: Mapping[int, Scheme]) -> list[Plan]:
        """Full precision, the plans of the published figures, and the grid; in data-flow order."""
        choices: list[Mapping[str, int]] = [{}, *(figure.plan for figure in self.figures)]
        if self.grid:
            choices += [dict(zip(self.grid, row, strict=True)) for row in itertools.product(*self.grid.values())]
        choices += [{name: width} for name in parts.names for width in self.alone]
        return list(dict.fromkeys(plan_of(parts, one, scheme_of) for one in choices))

    @property
    def widths(self) -> list[int]:
        used = {width for figure in self.figures for width in figure.plan.values()} | set(self.alone)
        used |= {width for widths in (self.grid or {}).values() for width in widths}
        return sorted(used - {NATIVE})


def alone(pattern: str, values: Mapping[int, float], **more: Any) -> tuple[Figure, ...]:
    """Published figures of one part, all others at native precision, by width; "*" is all parts together."""
    return tuple(Figure({pattern: width}, value, **more) for width, value in values.items())


def mixed(values: Mapping[tuple[int, ...], float], **more: Any) -> tuple[Figure, ...]:
    """Published figures of plans by the widths of vision, connector and language model."""
    return tuple(Figure(dict(zip(PARTS, widths, strict=False)), value, **more) for widths, value in values.items())


def plan_of(parts: ComponentMap, choice: Mapping[str, int], scheme_of: Mapping[int, Scheme]) -> Plan:
    return Plan.of(parts, {pattern: scheme_of.get(width) for pattern, width in choice.items()})
