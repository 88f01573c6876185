"""The straight line as functions: the only module that knows both wings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sensitivity import search
from sensitivity.allocate import Candidate, best_uniform, solve
from sensitivity.components import ComponentMap
from sensitivity.errors import UserError, unknown
from sensitivity.export import CHECKPOINTS, FORMATS, Codes, Job, write
from sensitivity.export.calibrated import codes as codes_of
from sensitivity.export.job import from_weights_alone
from sensitivity.export.plan_json import read, write_file
from sensitivity.export.verify import verify
from sensitivity.importance import rank
from sensitivity.legalize import Legal, legal, legalize
from sensitivity.legalize import candidates as legal_candidates
from sensitivity.models import VLM, inspect, load
from sensitivity.plan import Plan, Scheme
from sensitivity.quantize import Statistics, calibrate, method_of, scheme
from sensitivity.quantize.cache import Cache, home
from sensitivity.report import report
from sensitivity.runtimes import breaches
from sensitivity.sweep import Step, identity, versions
from sensitivity.sweep import run as run_plans
from sensitivity.tasks import Task
from sensitivity.tasks import task as find_task
from sensitivity.trials import Study
from sensitivity.verdict import Recommendation, judge, unmeasured

BITS = (2, 3, 4, 6, 8)
CACHE_GB = 8.0  # of calibration statistics on disk
FRESH = 1_000_003  # added to a study's seed where a choice is verified: other scenes than those it was made on

__all__ = [
    "calibrated",
    "export",
    "grid",
    "inspect",
    "legalize",
    "load",
    "one_at_a_time",
    "plans",
    "rank",
    "recommend",
    "report",
    "sweep",
    "sweeping",
    "verify",
]


def grid(
    parts: ComponentMap, bits: Sequence[int] = BITS, method: str = "rtn", schemes: Sequence[Scheme] = (), **chosen: Any
) -> list[Plan]:
    """Every combination of widths over components, and full precision."""
    return search.grid(parts, schemes=schemes or [scheme(method, width, **chosen) for width in bits])


def one_at_a_time(
    parts: ComponentMap, bits: Sequence[int] = BITS, method: str = "rtn", schemes: Sequence[Scheme] = (), **chosen: Any
) -> list[Plan]:
    """Each component alone at each width, the uniform plans, and full precision."""
    return search.one_at_a_time(parts, schemes=schemes or [scheme(method, width, **chosen) for width in bits])


Plans = Iterable[Plan] | Callable[[Study], Iterable[Plan]]


def plans(
    parts: ComponentMap, schemes: Sequence[Scheme], how: str = "grid", trials: int | None = None, seed: int = 0
) -> Plans:
    """What to try: a list where all plans are known beforehand; otherwise each is chosen when the last one is told."""
    if how in search.LISTS:
        return search.LISTS[how](parts, schemes, trials or 100, seed)[:trials]
    if how not in search.SAMPLERS:
        raise unknown("search", how, [*search.LISTS, *search.SAMPLERS])
    return lambda study: search.plans(study, schemes, how, trials, seed)


def sweep(vlm: VLM, parts: ComponentMap, plans: Plans, tasks: Sequence[str], out: Path | str, **how: Any) -> Study:
    """Evaluate every plan that the study at `out` does not hold yet, and return the study."""
    study, steps = sweeping(vlm, parts, plans, tasks, out, **how)
    for _ in steps:
        pass
    return study


def sweeping(
    vlm: VLM,
    parts: ComponentMap,
    plans: Plans,
    tasks: Sequence[str],
    out: Path | str,
    n: int = 1000,
    seed: int = 0,
    plain: bool = False,
    storage: str | None = None,
    statistics: Statistics | None = None,
) -> tuple[Study, Iterator[Step]]:
    """The study, and the sweep as something to walk along: each step is a finished trial.

    Methods that need calibration take it from `statistics`; without, the calibration splits of the tasks are used.
    """
    chosen = [find_task(name, "evaluation", n, seed) for name in dict.fromkeys(tasks)]
    facts = identity(vlm, chosen, tasks, n, seed)
    study = Study.create(out, parts, [task.name for task in chosen], facts, storage)
    if callable(plans):
        return study, run_plans(vlm, study, chosen, plans(study), plain, statistics)
    if statistics is None and isinstance(plans, Sequence):
        schemes = list(dict.fromkeys(one for plan in plans for _, one in plan.schemes if one))
        named, statistics = calibrated(vlm, parts, schemes, tasks, against=chosen)
        facts_of: dict[Scheme | None, Scheme | None] = {None: None, **dict(zip(schemes, named, strict=True))}
        plans = [Plan(tuple((name, facts_of[one]) for name, one in plan.schemes)) for plan in plans]
    return study, run_plans(vlm, study, chosen, plans, plain, statistics)


def calibrated(
    vlm: VLM,
    parts: ComponentMap,
    schemes: Sequence[Scheme],
    tasks: Sequence[str],
    n: int = 128,
    seed: int = 0,
    path: str = "float",
    against: Iterable[Task] = (),
    cache_gb: float = CACHE_GB,
) -> tuple[list[Scheme], Statistics | None]:
    """The schemes with the data that they are calibrated on written into them, and the statistics if any need them.

    Schemes that already name their data are calibrated on that.
    """
    needing = [one for one in schemes if method_of(one).calibrated]
    if not needing:
        return list(schemes), None
    named = {tuple(one.get(fact) for fact in ("calibration", "examples", "seed", "path")) for one in needing}
    if len(named) > 1:
        raise UserError("these plans were calibrated on different data; run those of each in a sweep of its own")
    if None not in (known := named.pop()):
        tasks, n, seed, path = str(known[0]).split(","), int(known[1] or 0), int(known[2] or 0), str(known[3])
    cache = Cache(home(), cache_gb) if cache_gb > 0 else None
    statistics = calibrate(vlm, parts, tasks, n, seed, path, against, cache)
    return [
        replace(one, settings=tuple({**dict(one.settings), **statistics.facts}.items())) if one in needing else one
        for one in schemes
    ], statistics


def recommend(
    study: Study,
    bpw: float,
    run: VLM | None = None,
    task: str | None = None,
    floors: Mapping[str, float] | None = None,
    top: int = 3,
    runtime: str | None = None,
) -> Recommendation:
    """The plan with the best predicted score within a budget; with `run`, verified by running it.

    The best few candidates run on examples that had no part in choosing them (where the task has more), beside full
    precision and the best uniform plan of at most the same size, in a study of its own under `verify`: done once.
    """
    chosen, steps = recommending(study, bpw, run, task, floors, top, runtime)
    for _ in steps:
        pass
    return chosen()


def recommending(
    study: Study,
    bpw: float,
    run: VLM | None = None,
    task: str | None = None,
    floors: Mapping[str, float] | None = None,
    top: int = 3,
    runtime: str | None = None,
) -> tuple[Callable[[], Recommendation], Iterator[Step]]:
    """The verification as something to walk along, and what gives the recommendation once that is done."""
    asked = {
        "bpw": bpw,
        "task": task or study.tasks[0],
        "floors": dict(floors or {}),
        "top": top,
        "runtime": runtime,
    }
    candidates, rival = _proposed(study, asked)
    if run is None:
        return lambda: unmeasured(study, candidates, task, {"asked": asked}), iter(())
    if study.meta.get("fingerprint") != run.fingerprint:
        raise UserError(f"{study.path} was measured on {study.meta.get('model')}, and {run.name} is another model")
    plans = [candidate.plan for candidate in (*candidates, *([rival] if rival else []))]
    meta = study.meta
    second, steps = sweeping(
        run, study.parts, plans, meta["tasks"], study.path / "verify", n=meta["n"], seed=meta["seed"] + FRESH
    )
    return lambda: _judged(study, second, candidates, rival, asked), steps


def remember(study: Study, found: Recommendation) -> Path:
    """Write a recommendation as the study's plan.json, with all that says where it comes from."""
    return write_file(study.parts, found.plan, found.to_json(), study.path / "plan.json")


def recommended(study: Study) -> Recommendation | None:
    """What was last recommended for a study, from what its verification measured; None if nothing was."""
    if not (study.path / "plan.json").exists():
        return None
    asked = read(study.path / "plan.json")[2].get("provenance", {}).get("asked")
    if asked is None:
        return None
    candidates, rival = _proposed(study, asked)
    if not (study.path / "verify").exists():
        return unmeasured(study, candidates, asked["task"], {"asked": asked})
    return _judged(study, Study(study.path / "verify"), candidates, rival, asked)


def _proposed(study: Study, asked: Mapping[str, Any]) -> tuple[list[Candidate], Candidate | None]:
    """The best few plans by prediction, and the best uniform one that fits as well."""
    bpw, task, floors, top = (asked[name] for name in ("bpw", "task", "floors", "top"))
    if runtime := asked.get("runtime"):
        found = legal_candidates(study, runtime, bpw, task, floors, top)
    else:
        found = solve(study, bpw=bpw, tasks=[task], floors=floors, top=top)
    return found, best_uniform(study, found[0], task)


def _judged(
    study: Study, second: Study, candidates: Sequence[Candidate], rival: Candidate | None, asked: dict[str, Any]
) -> Recommendation:
    known, again = study.examples(study.native), second.examples(second.native)
    fresh = known is not None and again is not None and set(known["example"]).isdisjoint(again["example"])
    facts = {"asked": asked, "verified": dict(second.meta), "versions": versions()}
    return judge(study, candidates, rival, second, asked["task"], fresh=fresh, provenance=facts)


def export(
    study: Study,
    plan: Plan,
    out: Path | str,
    format: str = "plan",
    force: bool = False,
    facts: dict[str, Any] | None = None,
    *,
    model: VLM | str | None = None,
    runtime: str | None = None,
    codes: Codes | None = None,
) -> Path:
    """Write a plan as the files that a runtime loads; a plan that it cannot load is refused, with what would fit."""
    out, meta, name = Path(out), study.meta, runtime or format
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if found := breaches(study.parts, plan, name):
        raise UserError(f"{name} cannot hold this plan: {'; '.join(found)}. {_instead(study, plan, name)}")
    job = Job(
        model=model or meta.get("model", ""),
        parts=study.parts,
        plan=plan,
        facts={"study": str(study.path), **(facts or {})},
        dtype=getattr(torch, meta.get("dtype", "float16")),
    )
    if format != "plan" and meta.get("fingerprint") not in (None, job.source.fingerprint):
        raise UserError(f"{study.path} was measured on {meta['model']}, and {job.source.name} is another model")
    trial, expected = _measured(study, plan)
    with _codes(study, job, format) as found_again:
        write(replace(job, codes=codes or found_again), out, format, force, trial, runtime, expected)
    return out / "plan.json" if format == "plan" and out.suffix != ".json" else out


def _codes(study: Study, job: Job, format: str) -> AbstractContextManager[Codes]:
    """How the weights of a plan are quantised: from the weights alone, or calibrated again on the data it names."""
    schemes = list(dict.fromkeys(scheme for _, scheme in job.plan.schemes if scheme is not None))
    if format not in CHECKPOINTS or not any(method_of(scheme).calibrated for scheme in schemes):
        return nullcontext(from_weights_alone)
    vlm = load(job.model, dtype=study.meta["dtype"]) if isinstance(job.model, str) else job.model
    _, statistics = calibrated(vlm, study.parts, schemes, study.meta["tasks"])
    assert statistics is not None
    return codes_of(vlm, study.parts, job.plan, statistics)


def export_from(source: Path, bpw: float | None, out: Path, format: str, force: bool, **how: Any) -> Path:
    """Export a plan.json, or the best predicted plan of a study for a budget."""
    study, plan, facts = _source(source, bpw, how.get("runtime"))
    return export(study, plan, out, format, force, facts, **how)


def legalize_from(source: Path, runtime: str, bpw: float | None, task: str | None = None) -> tuple[Study, Legal]:
    """The best plan that a runtime can load, for a plan.json or a budget of a study."""
    if source.suffix == ".json":
        study, plan, _ = _source(source, None, None)
        return study, legalize(study, plan, runtime, bpw, task)
    study, plan, _ = _source(source, bpw, None)
    return study, legalize(study, plan, runtime, bpw, task)


def _source(source: Path, bpw: float | None, runtime: str | None) -> tuple[Study, Plan, dict[str, Any]]:
    if source.suffix == ".json":
        _, plan, facts = read(source)
        here = (source.parent / "journal.log").exists() or (source.parent / "storage.url").exists()
        return Study(source.parent if here else facts.get("study", source.parent)), plan, facts
    if bpw is None:
        raise UserError(f"a study holds many plans: name a budget, `{source} --bpw 4.0`, or give a plan.json")
    study = Study(source)
    return study, (legal(study, runtime, bpw) if runtime else solve(study, bpw=bpw)[0]).plan, {}


def _instead(study: Study, plan: Plan, name: str) -> str:
    try:
        found = legalize(study, plan, name)
    except UserError as error:
        return f"There is no plan to offer instead: {error}"
    return (
        f"The best plan of its size that fits is {found.plan.describe()}: {found.words}. "
        f"`sensitivity legalize {study.path} --runtime {name} --bpw {found.before.bpw:.2f}` writes it"
    )


def _measured(study: Study, plan: Plan) -> tuple[dict[str, Any], Path | None]:
    """The trial that measured a plan, on fresh examples where there are any, and the file of its answers."""
    studies = [Study(study.path / "verify")] if (study.path / "verify" / "journal.log").exists() else []
    for one in (*studies, study):
        trials = {trial.user_attrs["key"]: trial.user_attrs for trial in one.trials()}
        if found := trials.get(plan.key):
            native = trials.get(study.native.key, {}).get("scores", {})
            about = {name: found.get(name) for name in ("scores", "path", "versions")}
            path = one.path / "examples" / f"{plan.key}.parquet"
            return {
                **about,
                "full_precision_scores": native,
                "meta": dict(one.meta),
                "note": one.meta.get("note"),
            }, path if path.exists() else None
    return {}, None
