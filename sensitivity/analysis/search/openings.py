"""Yields plans one by one: first the given openings, then what a function proposes from all measurements so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from sensitivity.spec.plan import Plan
from sensitivity.study.study import Study


def openings_then_proposals(
    study: Study, openings: Sequence[Plan], propose: Callable[[Study], Iterable[Plan]], trials: int
) -> Iterator[Plan]:
    """Yield plans that the study does not hold, until it holds `trials` of them or nothing new is proposed."""
    for plan in openings:
        keys = {trial.key for trial in study.trials()}
        if len(keys) >= trials:
            return
        if plan.key not in keys:
            yield plan
    while len(keys := {trial.key for trial in study.trials()}) < trials:
        new = next((plan for plan in propose(study) if plan.key not in keys), None)
        if new is None:
            return
        yield new
