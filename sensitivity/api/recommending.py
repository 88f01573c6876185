"""recommend(): the best plans for budgets, verified by running them."""

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

FRESH = 1_000_003  # added to a study's seed where a choice is verified: other scenes than those it was made on


def recommend(
    study: Study,
    bpw: float,
    run: VLM | None = None,
    task: str | None = None,
    floors: Mapping[str, float] | None = None,
    **limits: Any,
) -> Recommendation:
    """The plan with the best predicted score within a budget; with `run`, verified by running it.

    The best few candidates run on examples that had no part in choosing them (where the task has more), beside full
    precision and the best uniform plan of at most the same size, in a study of its own under `verify`: done once.
    limits: see Wish; weights of several tasks instead of one task, allow, tie, runtime, top.

    Examples:
        >>> from sensitivity import recommend
        >>> choice = recommend(study, bpw=5.0, run=vlm)
        >>> choice.size.bpw <= 5.0, choice.measured.n
        (True, 20)
    """
    weights = limits.pop("weights", None) or {task or study.tasks[0]: 1.0}
    return recommend_each(study, Wish((bpw,), weights, floors or {}, **limits), run)[0]


def recommend_each(study: Study, wish: Wish, run: VLM | None = None) -> list[Recommendation]:
    """A recommendation per budget; what several of them want to run is run once."""
    chosen, steps = recommending(study, wish, run)
    for _ in steps:
        pass
    return chosen()


def recommending(
    study: Study, wish: Wish, run: VLM | None = None
) -> tuple[Callable[[], list[Recommendation]], Iterator[Step]]:
    """The verification as something to walk along, and what gives the recommendations once that is done."""
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
    facts: dict[str, Any] = {"asked": wish.to_json()}
    if second is None:
        return [unmeasured(study, candidates, wish.weights, facts) for candidates, _ in found]
    known, again = study.examples(study.native), second.examples(second.native)
    fresh = known is not None and again is not None and set(known["example"]).isdisjoint(again["example"])
    facts |= {"verified": dict(second.meta), "versions": versions()}
    return [
        judge(study, candidates, rival, second, wish.weights, fresh=fresh, provenance=facts)
        for candidates, rival in found
    ]
