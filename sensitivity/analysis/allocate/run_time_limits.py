"""Limits on what a plan takes while it runs, such as milliseconds per token, as constraints of the knapsack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.spec.runtimes.layer_times import LIMITED, LayerTimes

if TYPE_CHECKING:
    from sensitivity.analysis.surrogate.space import Choice, Space

UNITS = {"ms_per_token": "ms per token", "ms_per_answer": "ms per answer", "gb_resident": "GB resident"}


@dataclass(frozen=True)
class RunTimeLimits:
    """The most that a plan may take in its runtime, and the times of layers by which that is predicted."""

    times: LayerTimes
    most: Mapping[str, float]  # cost -> limit

    def __post_init__(self) -> None:
        assert set(self.most) <= set(LIMITED), self.most

    def predicted(self, parts: ComponentMap, plan: Plan) -> dict[str, float]:
        """The predicted amount of each limited cost."""
        return {cost: self.times.plan_cost(parts, plan, cost) for cost in self.most}

    def hold(self, parts: ComponentMap, plan: Plan) -> bool:
        """Whether a plan is predicted to keep to all limits; False if one of its layers was never timed."""
        return self.times.knows(parts, plan, self.most) and all(
            value <= self.most[cost] for cost, value in self.predicted(parts, plan).items()
        )

    def rows(self, parts: ComponentMap, space: Space) -> dict[str, tuple[np.ndarray, float]]:
        """For each cost, what every choice of every component adds to it, and how much of the limit is left for them.

        NaN stands for a choice that was never timed. If no quantized choice of a component was timed, it is an error.
        """
        found = {}
        for cost, most in self.most.items():
            each = [
                self._of_component(parts, name, options, cost)
                for name, options in zip(space.names, space.choices, strict=True)
            ]
            found[cost] = np.concatenate(each), most - self.times.fixed_cost(cost)
        return found

    def _of_component(self, parts: ComponentMap, name: str, options: Sequence[Choice], cost: str) -> np.ndarray:
        """What each choice of a component adds to a cost; NaN where it was never timed."""
        costs, failure = np.full(len(options), np.nan), None
        for i, option in enumerate(options):
            try:
                costs[i] = self.times.component_cost(parts, name, option, cost)
            except UserError as error:
                failure = error
        if failure and not np.isfinite(costs[[option is not None for option in options]]).any():
            raise failure
        return costs


def cost_in_words(cost: str, value: float) -> str:
    """A cost with its unit, such as 12.3 ms per token."""
    return f"{value:.4g} {UNITS[cost]}"


def check_limits(most: Mapping[str, float], runtime: str | None) -> None:
    """Raise an error for limits without a runtime, or that are not positive numbers."""
    if most and runtime is None:
        flag = f"--{next(iter(most)).replace('_', '-')}"
        raise UserError(f"{flag} is about a runtime on this machine; name it too, as --runtime openvino")
    if bad := [value for value in most.values() if not 0 < value < float("inf")]:
        raise UserError(f"a limit must be above 0, not {bad[0]:g}")
