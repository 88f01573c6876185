"""recommend(): finds the best plans for budgets and verifies them by running them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sensitivity.analysis.allocate.budget import Wish
from sensitivity.analysis.allocate.kept_recommendation import Proposed, proposed
from sensitivity.analysis.allocate.recommendation import Recommendation, judge, unmeasured
from sensitivity.api.sweeping import sweeping
from sensitivity.measure.loop import Step, versions
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError
from sensitivity.study.study import Study

FRESH = 1_000_003  # added to the seed for verification, so that its examples are not those of the study


def recommend(
    study: Study,
    bpw: float,
    run: VLM | None = None,
    task: str | None = None,
    floors: Mapping[str, float] | None = None,
    **limits: Any,
) -> Recommendation:
    """The plan with the best predicted score within a budget; with `run`, the model, verified by running it.

    The best few candidates, full precision and the best uniform plan within the budget run on fresh examples, where
    the task has more than the study used. Their trials are a study under `verify`, so that none is run twice.
    limits: further fields of Wish: weights (of several tasks, instead of `task`), allow, tie, runtime, top.

    Examples:
        >>> from sensitivity import recommend
        >>> choice = recommend(study, bpw=5.0, run=vlm)
        >>> choice.size.bpw <= 5.0, choice.measured.n
        (True, 20)
    """
    weights = limits.pop("weights", None) or {task or study.tasks[0]: 1.0}
    return recommend_each(study, Wish((bpw,), weights, floors or {}, **limits), run)[0]


def recommend_each(study: Study, wish: Wish, run: VLM | None = None) -> list[Recommendation]:
    """A recommendation for each budget; a plan that is a candidate for several budgets is run once."""
    chosen, steps = recommending(study, wish, run)
    for _ in steps:
        pass
    return chosen()


def recommending(
    study: Study, wish: Wish, run: VLM | None = None
) -> tuple[Callable[[], list[Recommendation]], Iterator[Step]]:
    """A function that returns the recommendations, and an iterator that runs the verification step by step.

    The iterator must be exhausted first: the command line shows progress between its steps.
    """
    found = proposed(study, wish)
    if run is None:
        return lambda: _judged(study, None, found, wish), iter(())
    if study.meta.get("fingerprint") != run.fingerprint:
        raise UserError(f"{study.path} was measured on {study.meta.get('model')}, and {run.name} is another model")
    plans = [one.plan for candidates, rival in found for one in (*candidates, *([rival] if rival else []))]
    meta = study.meta
    how = {"n": meta["n"], "seed": meta["seed"] + FRESH, "whole": meta.get("whole_answers", False)}
    second, steps = sweeping(run, study.parts, plans, meta["tasks"], study.path / "verify", **how)
    return lambda: _judged(study, second, found, wish), steps


def _judged(study: Study, second: Study | None, found: Proposed, wish: Wish) -> list[Recommendation]:
    """A recommendation per budget: by the trials of the second study, or by prediction alone without one."""
    facts: dict[str, Any] = {"asked": wish.to_json()}
    if second is None:
        return [unmeasured(study, candidates, wish.weights, facts) for candidates, _ in found]
    # a task without enough examples gives the second study some of the first's: the verdict must say so
    known, again = study.examples(study.native), second.examples(second.native)
    fresh = known is not None and again is not None and set(known["example"]).isdisjoint(again["example"])
    facts |= {"verified": dict(second.meta), "versions": versions()}
    return [
        judge(study, candidates, rival, second, wish.weights, fresh=fresh, provenance=facts)
        for candidates, rival in found
    ]
