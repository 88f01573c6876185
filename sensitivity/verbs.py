"""The straight line as functions: with exporting, the only module that knows both wings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sensitivity import search
from sensitivity.allocate import Wish
from sensitivity.batches import check as suits
from sensitivity.components import ComponentMap, granularity
from sensitivity.contenders import Until
from sensitivity.errors import UserError
from sensitivity.importance import rank
from sensitivity.legalize import plans_for
from sensitivity.models import VLM, device_of, dtype_of, inspect, load
from sensitivity.models.blank import blank
from sensitivity.place import usable
from sensitivity.plan import Plan, Scheme
from sensitivity.preflight import foresee
from sensitivity.probe import NOTABLY, slower
from sensitivity.quantize import Statistics, calibrate, method_of, scheme
from sensitivity.quantize.cache import Cache, home
from sensitivity.quantize.statistics import known_path
from sensitivity.recommended import Proposed, check_wish, proposed, recommended, remember
from sensitivity.report import report
from sensitivity.runtimes import files_of
from sensitivity.search import Plans, plans
from sensitivity.sweep import MEMORY_GB, Step, check_runs, identity, versions
from sensitivity.sweep import run as run_plans
from sensitivity.tasks import Task, distinct, find
from sensitivity.tasks import task as find_task
from sensitivity.threads import available
from sensitivity.trials import Study
from sensitivity.verdict import Recommendation, judge, unmeasured

BITS = (2, 3, 4, 6, 8)
CACHE_GB = 8.0  # of calibration statistics on disk
FRESH = 1_000_003  # added to a study's seed where a choice is verified: other scenes than those it was made on

__all__ = [
    "Plans",
    "blank",
    "calibrated",
    "check",
    "check_wish",
    "device_of",
    "dtype_for",
    "dtype_of",
    "foresee",
    "grid",
    "inspect",
    "load",
    "one_at_a_time",
    "plans",
    "plans_for",
    "rank",
    "recommend",
    "recommend_each",
    "recommended",
    "remember",
    "report",
    "suits",
    "sweep",
    "sweeping",
]


def grid(
    parts: ComponentMap, bits: Sequence[int] = BITS, method: str = "rtn", schemes: Sequence[Scheme] = (), **chosen: Any
) -> list[Plan]:
    """Every combination of widths over components, and full precision.

    Examples:
        >>> from sensitivity import grid
        >>> plans = grid(parts, bits=(2, 4, 8), method="uniform")
        >>> len(plans)  # 3 widths of 3 parts, and full precision
        28
    """
    return search.grid(parts, schemes or [scheme(method, width, **chosen) for width in bits])


def one_at_a_time(
    parts: ComponentMap, bits: Sequence[int] = BITS, method: str = "rtn", schemes: Sequence[Scheme] = (), **chosen: Any
) -> list[Plan]:
    """Each component alone at each width, the uniform plans, and full precision.

    Examples:
        >>> from sensitivity import one_at_a_time
        >>> len(one_at_a_time(parts, bits=(2, 4, 8)))  # 3 widths of 3 parts, 3 uniform plans, and full precision
        13
    """
    return search.one_at_a_time(parts, schemes or [scheme(method, width, **chosen) for width in bits])


def check(
    by: str, how: str, schemes: Sequence[Scheme], tasks: Sequence[str], device: str, dtype: str | None, path: str,
    runtime: str | None, until: Sequence[str], out: Path, storage: str | None,
) -> bool:  # fmt: skip
    """What of a sweep can be known to be wrong before any weight or example is read; whether it is to be calibrated."""
    granularity(by)
    search.known(how)
    device_of(device)
    dtype_of(dtype)
    files_of(runtime)
    known_path(path)
    Until.parse(until)
    for name in tasks:
        find(name)
    usable(out, storage)
    return any(method_of(one).calibrated for one in schemes)


def dtype_for(name: str, device: str, out: Path | str) -> tuple[str | None, str]:
    """The type of numbers to sweep a model in where none was asked for, and why, in words; None is as `load` does it.

    A study goes on in its own. A new one takes what is stored, or float32, which holds the same numbers, where this
    machine computes notably faster in that and has the memory.
    """
    with suppress(UserError, KeyError):  # none is there, or one that was imported
        return str(Study(out).meta["dtype"]), ""
    if device == "auto" or name.startswith("embedded:"):
        return None, ""
    vlm = load(name, device=device, config_only=True)
    stored = getattr(vlm.model.config, "dtype", None)
    if stored not in (torch.bfloat16, torch.float16):
        return None, ""
    called, times = str(stored).removeprefix("torch."), slower(stored, target := torch.device(device))
    if times < NOTABLY:
        return called, ""
    size = 4 * sum(weight.numel() for weight in vlm.model.parameters())
    if target.type == "cpu" and size > available():
        return called, f"{called} is {times:.1f} times slower here than float32, for which memory has no room"
    return "float32", f"computing in float32: {called}, as stored, is {times:.1f} times slower here (--dtype overrides)"


def sweep(vlm: VLM, parts: ComponentMap, plans: Plans, tasks: Sequence[str], out: Path | str, **how: Any) -> Study:
    """Evaluate every plan that the study at `out` does not hold yet, and return the study.

    Examples:
        >>> from sensitivity import sweep
        >>> study = sweep(vlm, parts, plans, tasks=["vqa"], out="runs/vqa", n=20)
    """
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
    until: Sequence[str] = (),
    memory_gb: float = MEMORY_GB,
    whole: bool = False,
) -> tuple[Study, Iterator[Step]]:
    """The study, and the sweep as something to walk along: each step is a finished trial.

    Methods that need calibration take it from `statistics`; without, the calibration splits of the tasks are used.
    `until` may end it early: "10min", "error<0.5%"; examples then go to the plans that matter. Answers that can no
    longer be right are left off there, unless they are wanted `whole`.
    """
    limit = Until.parse(until)
    chosen = [find_task(name, "evaluation", n, seed, whole) for name in dict.fromkeys(tasks)]
    distinct(chosen, list(dict.fromkeys(tasks)))
    check_runs(vlm, chosen)
    facts = identity(vlm, chosen, tasks, n, seed) | ({"whole_answers": True} if whole else {})
    suits(vlm, chosen)
    study = Study.create(out, parts, [task.name for task in chosen], facts, storage)
    if callable(plans):
        return study, run_plans(vlm, study, chosen, plans(study), plain, statistics, limit, memory_gb)
    if statistics is None and isinstance(plans, Sequence):
        schemes = list(dict.fromkeys(one for plan in plans for _, one in plan.schemes if one))
        named, statistics = calibrated(vlm, parts, schemes, tasks, against=chosen)
        facts_of: dict[Scheme | None, Scheme | None] = {None: None, **dict(zip(schemes, named, strict=True))}
        plans = [Plan(tuple((name, facts_of[one]) for name, one in plan.schemes)) for plan in plans]
    return study, run_plans(vlm, study, chosen, plans, plain, statistics, limit, memory_gb)


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
