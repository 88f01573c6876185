"""The straight line as functions: the only module that knows both wings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sensitivity.allocate import Candidate, Recommendation, best_uniform, judge, solve
from sensitivity.components import ComponentMap
from sensitivity.errors import UserError
from sensitivity.export import write
from sensitivity.importance import rank
from sensitivity.models import VLM, inspect, load
from sensitivity.plan import Plan
from sensitivity.report import report
from sensitivity.search import grid, one_at_a_time
from sensitivity.sweep import Step, identity, run
from sensitivity.tasks import task as find_task
from sensitivity.trials import Study

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
    return study, run(vlm, study, chosen, plans, plain)


def recommend(study: Study, bpw: float, run: VLM | None = None, tasks: Sequence[str] | None = None) -> Recommendation:
    """The plan with the best predicted score within a budget; with `run`, verified by running it.

    Verified on fresh examples where the task has any, against full precision and the best uniform plan of at most
    the same size, in a study of its own under `verify`, so that it is done once.
    """
    candidates = solve(study, bpw=bpw, tasks=tasks)
    if run is None:
        return Recommendation.of(candidates[0])
    rival = best_uniform(study, candidates[0])
    return judge(study, candidates, rival, verify(study, run, [*candidates, *([rival] if rival else [])]))


def verify(study: Study, vlm: VLM, candidates: Sequence[Candidate]) -> Study:
    """Run candidates on examples that none of them was chosen on."""
    meta = study.meta
    if meta["fingerprint"] != vlm.fingerprint:
        raise UserError(f"{study.path} was measured on {meta['model']}, and {vlm.name} is another model")
    return sweep(
        vlm,
        study.parts,
        [candidate.plan for candidate in candidates],
        meta["tasks"],
        study.path / "verify",
        n=meta["n"],
        seed=meta["seed"] + FRESH,
    )


def export(
    source: VLM | None,
    parts: ComponentMap,
    plan: Plan,
    out: Path | str,
    format: str = "plan",
    force: bool = False,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write a plan as the files that a runtime loads."""
    return write(parts, plan, facts or {}, Path(out), format, force)
