"""The straight line as functions: the only module that knows both wings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sensitivity.allocate import Candidate, best_uniform, solve
from sensitivity.components import ComponentMap
from sensitivity.errors import UserError, unknown
from sensitivity.export import write
from sensitivity.export.plan_json import read
from sensitivity.importance import rank
from sensitivity.models import VLM, inspect, load
from sensitivity.plan import Plan, Scheme
from sensitivity.report import report
from sensitivity.search import grid, one_at_a_time, random
from sensitivity.sweep import Step, identity, versions
from sensitivity.sweep import run as run_plans
from sensitivity.tasks import task as find_task
from sensitivity.trials import Study
from sensitivity.verdict import Recommendation, judge, unmeasured

FRESH = 1_000_003  # added to a study's seed where a choice is verified: other scenes than those it was made on

__all__ = [
    "export",
    "grid",
    "inspect",
    "load",
    "one_at_a_time",
    "rank",
    "recommend",
    "report",
    "sweep",
    "sweeping",
]


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
) -> tuple[Study, Iterator[Step]]:
    """The study, and the sweep as something to walk along: each step is a finished trial."""
    chosen = [find_task(name, "evaluation", n, seed) for name in dict.fromkeys(tasks)]
    study = Study.create(out, parts, [task.name for task in chosen], identity(vlm, chosen, tasks, n, seed), storage)
    return study, run_plans(vlm, study, chosen, plans, plain)


def plans(
    parts: ComponentMap, schemes: Sequence[Scheme], search: str = "grid", trials: int | None = None, seed: int = 0
) -> Iterable[Plan]:
    """What to try: a list where all plans are known beforehand, otherwise plans one after the other."""
    if search not in SEARCHES:
        raise unknown("search", search, SEARCHES)
    return SEARCHES[search](parts, schemes, trials, seed)


SEARCHES: dict[str, Callable[[ComponentMap, Sequence[Scheme], int | None, int], Iterable[Plan]]] = {
    "grid": lambda parts, schemes, trials, seed: grid(parts, schemes=schemes)[:trials],
    "one-at-a-time": lambda parts, schemes, trials, seed: one_at_a_time(parts, schemes=schemes)[:trials],
    "random": lambda parts, schemes, trials, seed: random(parts, trials or 100, schemes=schemes, seed=seed),
}


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
