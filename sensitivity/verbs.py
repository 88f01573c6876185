"""The straight line as functions: the only module that knows both wings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sensitivity import search
from sensitivity.allocate import Candidate, best_uniform, solve
from sensitivity.components import ComponentMap
from sensitivity.errors import UserError, unknown
from sensitivity.export import write
from sensitivity.export.plan_json import read, write_file
from sensitivity.importance import rank
from sensitivity.models import VLM, inspect, load
from sensitivity.plan import Plan, Scheme
from sensitivity.quantize import Statistics, calibrate, method_of, scheme
from sensitivity.quantize.cache import Cache, home
from sensitivity.report import report
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
    "load",
    "one_at_a_time",
    "plans",
    "rank",
    "recommend",
    "report",
    "sweep",
    "sweeping",
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


def plans(
    parts: ComponentMap, schemes: Sequence[Scheme], how: str = "grid", trials: int | None = None, seed: int = 0
) -> Iterable[Plan]:
    """What to try: a list where all plans are known beforehand, otherwise plans one after the other."""
    if how not in SEARCHES:
        raise unknown("search", how, SEARCHES)
    return SEARCHES[how](parts, schemes, trials, seed)


SEARCHES: dict[str, Callable[[ComponentMap, Sequence[Scheme], int | None, int], Iterable[Plan]]] = {
    "grid": lambda parts, schemes, trials, seed: grid(parts, schemes=schemes)[:trials],
    "one-at-a-time": lambda parts, schemes, trials, seed: one_at_a_time(parts, schemes=schemes)[:trials],
    "random": lambda parts, schemes, trials, seed: search.random(parts, trials or 100, schemes=schemes, seed=seed),
}


def sweep(
    vlm: VLM, parts: ComponentMap, plans: Iterable[Plan], tasks: Sequence[str], out: Path | str, **how: Any
) -> Study:
    """Evaluate every plan that the study at `out` does not hold yet, and return the study."""
    study, steps = sweeping(vlm, parts, plans, tasks, out, **how)
    for _ in steps:
        pass
    return study


def sweeping(
    vlm: VLM,
    parts: ComponentMap,
    plans: Iterable[Plan],
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
) -> Recommendation:
    """The plan with the best predicted score within a budget; with `run`, verified by running it.

    The best few candidates run on examples that had no part in choosing them (where the task has more), beside full
    precision and the best uniform plan of at most the same size, in a study of its own under `verify`: done once.
    """
    chosen, steps = recommending(study, bpw, run, task, floors, top)
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
) -> tuple[Callable[[], Recommendation], Iterator[Step]]:
    """The verification as something to walk along, and what gives the recommendation once that is done."""
    asked = {"bpw": bpw, "task": task or study.tasks[0], "floors": dict(floors or {}), "top": top}
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
    candidates = solve(study, bpw=asked["bpw"], tasks=[asked["task"]], floors=asked["floors"], top=asked["top"])
    return candidates, best_uniform(study, candidates[0], asked["task"])


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
) -> Path:
    """Write a plan as the files that a runtime loads."""
    return write(study.parts, plan, facts or {}, Path(out), format, force)


def export_from(source: Path, bpw: float | None, out: Path, format: str, force: bool) -> Path:
    """Export a plan.json, or the best predicted plan of a study for a budget."""
    if source.suffix == ".json":
        _, plan, facts = read(source)
        return export(Study(source.parent), plan, out, format, force, facts)
    if bpw is None:
        raise UserError(f"a study holds many plans: name a budget, `sensitivity export {source} --bpw 4.0 --out ...`")
    study = Study(source)
    return export(study, solve(study, bpw=bpw)[0].plan, out, format, force)
