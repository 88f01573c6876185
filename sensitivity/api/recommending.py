"""recommend(): finds the best plans for budgets and verifies them by running them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import TypedDict, Unpack

from sensitivity.analysis.recommending.judging import judge, unmeasured
from sensitivity.analysis.recommending.kept_recommendation import Proposed, proposed
from sensitivity.analysis.recommending.recommendation import Provenance, Recommendation
from sensitivity.analysis.recommending.request import TOP, PlanRequest
from sensitivity.api.sweeping import begin_sweep
from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.loop import Step, versions
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError, check_is, check_options
from sensitivity.spec.runtimes.layer_times import LayerTimes
from sensitivity.study.storage import paths
from sensitivity.study.study import Study

FRESH = 1_000_003  # added to the seed for verification, so that its examples are not those of the study


class PlanLimits(TypedDict, total=False):
    """Further fields of PlanRequest that `recommend` takes."""

    allow: Mapping[str, int | Sequence[int]]
    tie: Sequence[str] | Sequence[Sequence[str]]
    runtime: str | None
    top: int


def recommend(
    study: Study,
    bpw: float = 4.0,
    run: VLM | None = None,
    task: str | None = None,
    floors: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    **limits: Unpack[PlanLimits],
) -> Recommendation:
    """The plan with the best predicted score within a budget; with `run`, the model, verified by running it.

    The best few candidates, full precision and the best uniform plan within the budget run on fresh examples, where
    the task has more than the study used. Their trials are a study under `verify`, so that none is run twice.
    weights: task -> how much it counts, instead of `task`. limits: further fields of PlanRequest: allow, tie, runtime
    and top.

    Examples:
        >>> from sensitivity import recommend
        >>> choice = recommend(study, bpw=5.0, run=vlm)
        >>> choice.size.bpw <= 5.0, choice.measured.n
        (True, 20)
    """
    check_is("study", study, Study)
    check_options("recommend", limits, PlanLimits.__annotations__)
    if not isinstance(bpw, Real):
        several = "[recommend(study, bpw=one) for one in (3, 4)]"
        raise UserError(f"bpw must be one number, such as 4.0, not {bpw!r}; for several budgets: {several}")
    if run is not None:
        check_is("run", run, VLM)
    allow, tie = limits.pop("allow", {}), limits.pop("tie", ())
    allowed = {pattern: [one] if isinstance(one, int) else one for pattern, one in allow.items()}
    tied = [tie] if tie and all(isinstance(name, str) for name in tie) else tie  # a single group
    given = weights or {task or study.tasks[0]: 1.0}
    request = PlanRequest((bpw,), given, floors or {}, allowed, tied, limits.get("runtime"), limits.get("top", TOP))
    return recommend_each(study, request, run)[0]


def recommend_each(study: Study, request: PlanRequest, run: VLM | None = None) -> list[Recommendation]:
    """A recommendation for each budget; a plan that is a candidate for several budgets is run once."""
    recommendations, steps = begin_recommendation(study, request, run)
    for _ in steps:
        pass
    return recommendations()


def begin_recommendation(
    study: Study,
    request: PlanRequest,
    run: VLM | None = None,
    proposals: Proposed | None = None,
    times: LayerTimes | None = None,
    *,
    n: int | None = None,
    statistics: Statistics | None = None,
) -> tuple[Callable[[], list[Recommendation]], Iterator[Step]]:
    """A function that returns the recommendations, and an iterator of the steps of their verification.

    The iterator must be exhausted first: the command line shows progress between its steps. `proposals`: for each
    budget the candidates to run and their rival, the best uniform plan; by default the best that the study's surrogate
    predicts. `times`: the times of layers in the runtime, for a request with limits. `n`: how many examples they run
    on, by default as many as in an earlier verification, or in the study. `statistics`: what calibrated methods need.
    """
    proposals = proposals or proposed(study, request, times)
    if run is None:
        return lambda: _judged(study, None, proposals, request), iter(())
    run.check_weights()
    study.check_model(run.name, run.fingerprint)
    check_dtype(study, run)
    plans = [one.plan for candidates, rival in proposals for one in (*candidates, *([rival] if rival else []))]
    meta = study.meta
    verification, steps = begin_sweep(
        run,
        study.parts,
        plans,
        meta["tasks"],
        paths.verification_folder(study.path),
        n=n or verified_on(study),
        seed=meta["seed"] + FRESH,
        statistics=statistics,
        whole=meta.get("whole_answers", False),
    )
    return lambda: _judged(study, verification, proposals, request), steps


def check_dtype(study: Study, run: VLM) -> None:
    """Raise an error unless a model computes in the dtype of the study, with whose scores its own are compared."""
    dtype, wanted = str(run.model.dtype).removeprefix("torch."), study.meta.get("dtype")
    if wanted not in (None, dtype):
        raise UserError(
            f"{study.path} was measured in {wanted}, and this model is in {dtype}: load it with dtype='{wanted}' "
            f"(--dtype {wanted})"
        )


def verified_on(study: Study) -> int:
    """How many examples plans are verified on: as many as before, so that none runs twice, or as many as in the study.

    `sensitivity plan` verifies on more examples than its search used, so an earlier verification counts first.
    """
    folder = paths.verification_folder(study.path)
    return int((Study(folder) if paths.is_study(folder) else study).meta["n"])


def _judged(
    study: Study, verification: Study | None, proposals: Proposed, request: PlanRequest
) -> list[Recommendation]:
    """A recommendation per budget: by the trials of the verification, or by prediction alone without one."""
    facts: Provenance = {"asked": request.to_json()}
    if verification is None:
        return [unmeasured(study, candidates, request.weights, facts) for candidates, _ in proposals]
    # if a task has too few examples, both studies share some, and the verdict must say so
    chosen_on, run_on = study.examples(study.native), verification.examples(verification.native)
    fresh = chosen_on is not None and run_on is not None and set(chosen_on["example"]).isdisjoint(run_on["example"])
    facts |= {"verified": verification.meta, "versions": versions()}
    return [
        judge(study, candidates, rival, verification, request.weights, request.floors, fresh=fresh, provenance=facts)
        for candidates, rival in proposals
    ]
