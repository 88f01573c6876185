"""PlanRequest: what a user asks of a plan, such as budgets, the tasks that count, and constraints."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Required, TypedDict

TOP = 3  # candidates that are considered for each budget


class RequestJson(TypedDict, total=False):
    """A request as JSON values."""

    bpw: Required[list[float]]
    weights: Required[dict[str, float]]
    floors: dict[str, float]
    allow: dict[str, list[int]]
    tie: list[list[str]]
    runtime: str | None
    top: int
    limits: dict[str, float]


@dataclass(frozen=True)
class PlanRequest:
    """What a user asks of a plan: budgets in bits per weight, the tasks that count, and constraints.

    weights: task -> how much its share of full precision counts. floors: task -> share of full precision that must be
    kept. allow: pattern of component names -> widths, 16 for native. tie: groups of patterns whose components share
    their scheme. runtime: what is to load the plan; budgets then count the bits in its files. top: how many
    candidates are considered for each budget. limits: the most that a plan may take there: ms_per_token, ms_per_answer,
    gb_resident.
    """

    bpw: tuple[float, ...]
    weights: Mapping[str, float]
    floors: Mapping[str, float] = field(default_factory=dict)
    allow: Mapping[str, Sequence[int]] = field(default_factory=dict)
    tie: Sequence[Sequence[str]] = ()
    runtime: str | None = None
    top: int = TOP
    limits: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> RequestJson:
        """The request as JSON values."""
        found: RequestJson = {
            "bpw": list(self.bpw),
            "weights": dict(self.weights),
            "floors": dict(self.floors),
            "allow": {pattern: list(widths) for pattern, widths in self.allow.items()},
            "tie": [list(group) for group in self.tie],
            "runtime": self.runtime,
            "top": self.top,
        }
        return {**found, "limits": dict(self.limits)} if self.limits else found

    @property
    def typed(self) -> str:
        """All of the request but budgets and number of candidates, as flags of `sensitivity recommend`."""
        if len(self.weights) == 1:
            words = ["--task", *self.weights]
        else:
            words = [word for task, weight in self.weights.items() for word in ("--weight", f"{task}={weight}")]
        words += [word for task, share in self.floors.items() for word in ("--floor", f"{task}={share}")]
        for pattern, widths in self.allow.items():
            words += ["--allow", f"{pattern}={','.join(map(str, widths))}"]
        words += [word for group in self.tie for word in ("--tie", ",".join(group))]
        words += ["--runtime", self.runtime] if self.runtime else []
        for cost, most in self.limits.items():
            words += [f"--{cost.replace('_', '-')}", str(most)]
        return shlex.join(words)

    @classmethod
    def from_json(cls, data: RequestJson) -> PlanRequest:
        """The request that `to_json` wrote."""
        return cls(
            tuple(data["bpw"]),
            data["weights"],
            data.get("floors", {}),
            data.get("allow", {}),
            data.get("tie", ()),
            data.get("runtime"),
            data.get("top", TOP),
            data.get("limits", {}),
        )
