"""The best plan that a runtime can load: solved again under the budget, not rounded part by part; and its cost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sensitivity.allocate import Candidate, Knapsack, Predicted, solve
from sensitivity.errors import UserError
from sensitivity.plan import Plan, Scheme, Size, size
from sensitivity.readings import check_task
from sensitivity.runtimes import breaches, searches, tied
from sensitivity.trials import Study


@dataclass(frozen=True)
class Legal:
    """A plan that a runtime can load, beside the one that was asked for."""

    runtime: str
    task: str
    asked: Plan
    breaches: tuple[str, ...]  # of the plan that was asked for; none: it is the answer
    plan: Plan
    before: Size
    after: Size
    predicted_before: Predicted | None  # None where the plan holds a scheme that was never measured
    predicted_after: Predicted | None

    @property
    def words(self) -> str:
        """What it costs, as the end of a sentence."""
        if not self.breaches:
            return "nothing: the plan is legal as it is"
        change = (self.after.bytes - self.before.bytes) / self.before.bytes
        bytes_ = f"{self.after.bytes:,} bytes instead of {self.before.bytes:,} ({change:+.1%})"
        if self.predicted_before is None or self.predicted_after is None:
            return bytes_
        was, now = self.predicted_before.score, self.predicted_after.score
        return f"{self.task} {now:.4f} instead of {was:.4f} (predicted), {bytes_}"

    def to_json(self) -> dict[str, Any]:
        return {
            "runtime": self.runtime,
            "task": self.task,
            "asked": self.asked.to_json(),
            "breaches": list(self.breaches),
            "plan": self.plan.to_json(),
            "describe": self.plan.describe(),
            "size": self.after.to_json(),
            "size_asked": self.before.to_json(),
            "predicted": self.predicted_after and self.predicted_after.to_json(),
            "predicted_asked": self.predicted_before and self.predicted_before.to_json(),
            "cost": self.words,
        }


def legalize(study: Study, plan: Plan, runtime: str, bpw: float | None = None, task: str | None = None) -> Legal:
    """The plan itself if a runtime can load it, otherwise the best by prediction of at most its size, or of `bpw`."""
    task = check_task(study, task)
    before = size(study.parts, plan)
    found = tuple(breaches(study.parts, plan, runtime))
    predicted = _predicted(study, plan, task)
    fits = bpw is None or before.bits <= bpw * study.parts.numel
    if not found and fits:
        return Legal(runtime, task, plan, (), plan, before, before, predicted, predicted)
    best = legal(study, runtime, before.bpw if bpw is None else bpw, task)
    return Legal(runtime, task, plan, found, best.plan, before, best.size, predicted, best.predicted.get(task))


def legal(study: Study, runtime: str, bpw: float, task: str | None = None) -> Candidate:
    """The best plan for a budget among those that a runtime can load."""
    return candidates(study, runtime, bpw, task, top=1)[0]


def candidates(
    study: Study,
    runtime: str,
    bpw: float,
    task: str | None = None,
    floors: Mapping[str, float] | None = None,
    top: int = 3,
) -> list[Candidate]:
    """The best few plans for a budget among those that a runtime can load, best first."""
    task = check_task(study, task)
    found: list[Candidate] = []
    together = tied(study.parts, runtime)
    failure: UserError | None = None
    for allowed in searches(study.parts, runtime, sorted(_measured(study), key=str)):
        try:
            found += solve(study, bpw=bpw, tasks=[task], floors=floors, allowed=allowed, tied=together, top=top)
        except UserError as error:
            failure = failure or error
    if not found:
        why = f" ({failure})" if failure else ""
        raise UserError(
            f"nothing that was measured fits {runtime} in {bpw:.2f} bpw{why}; sweep schemes that it can load, such as "
            f"--method rtn --symmetric, or allow more bits with --bpw"
        ) from failure
    return sorted(found, key=lambda candidate: -candidate.predicted[task].score)[:top]


def _measured(study: Study) -> set[Scheme]:
    plans: Iterable[Plan] = (Plan.from_json(trial.user_attrs["plan"]) for trial in study.trials())
    return {scheme for plan in plans for _, scheme in plan.schemes if scheme is not None}


def _predicted(study: Study, plan: Plan, task: str) -> Predicted | None:
    with contextlib.suppress(UserError, KeyError, ValueError):
        return Knapsack.of(study, [task]).predicted([plan])[0][task]
    return None
