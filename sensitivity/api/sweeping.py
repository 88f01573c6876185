"""sweep(): evaluates plans for a model on tasks, and stores the results as a study."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from sensitivity.analysis.search.plan_lists import Plans, check_search
from sensitivity.analysis.search.plan_lists import grid as grid_
from sensitivity.analysis.search.plan_lists import one_at_a_time as one_at_a_time_
from sensitivity.measure.calibrate.cache import Cache, cache_folder
from sensitivity.measure.calibrate.calibration import calibration_statistics
from sensitivity.measure.calibrate.statistics import Statistics, check_path
from sensitivity.measure.forecast.hardware import WORTH_MEMORY, slowdown
from sensitivity.measure.generate.batches import check_tasks_fit
from sensitivity.measure.install.plan_in_model import HOLDING
from sensitivity.measure.loop import MEMORY_GB, Step, check_runs, comparability, run_plans
from sensitivity.models.loading import device_of, dtype_of, load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.methods import needs_both_paths, needs_data, token_weighting
from sensitivity.quantize.scheme_settings import schemes_of
from sensitivity.spec.components import ComponentMap, granularity
from sensitivity.spec.errors import UserError, check_is, check_is_path, check_options, each_is
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.table import files_of
from sensitivity.spec.threads import free_memory
from sensitivity.study.examples import questions
from sensitivity.study.identity import another_study
from sensitivity.study.stopping import Until
from sensitivity.study.storage.location import reachable_database
from sensitivity.study.study import Study
from sensitivity.study.table import check_task_names
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.table import check_distinct, find
from sensitivity.tasks.table import task as find_task

BITS = (2, 3, 4, 6, 8)
CACHE_GB = 8.0  # of calibration statistics on disk, at most


class SweepOptions(TypedDict, total=False):
    """The options of `sweep`; `begin_sweep` has their defaults, and its docstring says what they mean."""

    n: int
    seed: int
    plain: bool
    storage: str | None
    statistics: Statistics | None
    until: str | Sequence[str]
    memory_gb: float
    whole: bool
    runtime: str | None


def grid(
    parts: ComponentMap,
    bits: int | Sequence[int] = BITS,
    method: str | Sequence[str] = "rtn",
    schemes: Scheme | Sequence[Scheme] = (),
    **settings: Any,
) -> list[Plan]:
    """Every combination of widths over components, and full precision.

    bits and method: one or several; `schemes` are in place of both.

    Examples:
        >>> from sensitivity import grid
        >>> plans = grid(parts, bits=(2, 4, 8), method="uniform")
        >>> len(plans)  # 3 widths of 3 parts, and full precision
        28
    """
    check_is("parts", parts, ComponentMap)
    return grid_(parts, _schemes(bits, method, schemes, settings))


def one_at_a_time(
    parts: ComponentMap,
    bits: int | Sequence[int] = BITS,
    method: str | Sequence[str] = "rtn",
    schemes: Scheme | Sequence[Scheme] = (),
    **settings: Any,
) -> list[Plan]:
    """Each component alone at each width, the uniform plans, and full precision; arguments are those of `grid`.

    Examples:
        >>> from sensitivity import one_at_a_time
        >>> len(one_at_a_time(parts, bits=(2, 4, 8)))  # 3 widths of 3 parts, 3 uniform plans, and full precision
        13
    """
    check_is("parts", parts, ComponentMap)
    return one_at_a_time_(parts, _schemes(bits, method, schemes, settings))


def _schemes(
    bits: int | Sequence[int], method: str | Sequence[str], schemes: Scheme | Sequence[Scheme], settings: dict[str, Any]
) -> list[Scheme]:
    """The schemes that were given, or one for each method and width that it takes."""
    if given := each_is("schemes", schemes, Scheme):
        if settings or bits is not BITS or method != "rtn":
            raise UserError("schemes have bits and settings of their own: give schemes, or bits, method and settings")
        return given
    widths = list(bits) if isinstance(bits, Iterable) and not isinstance(bits, str) else [bits]
    return schemes_of(each_is("methods", method, str), widths, **settings)


def check_sweep(
    by: str, search: str, schemes: Sequence[Scheme], tasks: Sequence[str], device: str, dtype: str | None,
    path: str | None, runtime: str | None, until: Sequence[str], out: Path | None, storage: str | None,
) -> bool:  # fmt: skip
    """Check a sweep's arguments before any weight or example is read; return whether its methods need calibration."""
    granularity(by)
    check_search(search)
    device_of(device)
    dtype_of(dtype)
    files_of(runtime)
    check_path(path_for(schemes, path), schemes)
    Until.parse(until)
    for name in tasks:
        find(name)
    if out is not None:
        reachable_database(out, storage)
    return any(needs_data(one) for one in schemes)


def path_for(schemes: Iterable[Scheme], path: str | None) -> str:
    """The calibration path: the one that was asked for, or what the schemes need."""
    return path or ("both" if any(map(needs_both_paths, schemes)) else "float")


def dtype_for(name: str, device: str, out: Path | str | None) -> tuple[str | None, str]:
    """The default dtype of a sweep, and a sentence that says why; None leaves it to `load`.

    An existing study keeps its dtype. A new one takes that of the checkpoint, or float32, which represents the same
    numbers, where this machine computes notably faster in float32 and has memory for it.
    """
    with suppress(UserError, KeyError):  # no study yet, or an imported one, without a dtype
        if out is not None:
            return str(Study(out).meta["dtype"]), ""
    if device == "auto" or name.startswith("embedded:"):
        return None, ""
    vlm = load(name, device=device, config_only=True)
    stored = getattr(vlm.model.config, "dtype", None)
    if stored not in (torch.bfloat16, torch.float16):
        return None, ""
    dtype, times = str(stored).removeprefix("torch."), slowdown(stored, target := torch.device(device))
    if times < WORTH_MEMORY:
        return dtype, ""
    size = 4 * sum(weight.numel() for weight in vlm.model.parameters())
    if target.type == "cpu" and size > free_memory():
        return dtype, f"{dtype} is {times:.1f} times slower here than float32, for which memory is too small"
    return "float32", f"computing in float32: {dtype}, as stored, is {times:.1f} times slower here (--dtype overrides)"


def check_same_study(out: Path | str, tasks: Sequence[str], n: int, seed: int) -> None:
    """Raise an error if this folder holds a study of other tasks, or on other examples; no model is needed."""
    if (study := Study.begun(out)) is None:
        return
    for name, wanted in (("tasks", list(tasks)), ("n", n), ("seed", seed)):
        if (there := study.meta.get(name)) != wanted:
            raise another_study(study.path, f"{name}: there {there}, here {wanted}")


def keys_of_measured(out: Path | str) -> list[str]:
    """The keys of the plans that a sweep into this folder would find finished."""
    study = Study.begun(out)
    return list(dict.fromkeys(trial.key for trial in study.trials())) if study else []


def sweep(
    vlm: VLM,
    parts: ComponentMap,
    plans: Plans | Plan,
    tasks: str | Sequence[str],
    out: Path | str,
    **options: Unpack[SweepOptions],
) -> Study:
    """Evaluate every plan that the study at `out` does not hold yet, and return the study.

    plans, and tasks by their names: several, or a single one. Without plans, full precision alone runs.

    Examples:
        >>> from sensitivity import sweep
        >>> study = sweep(vlm, parts, plans, tasks=["vqa"], out="runs/vqa", n=20)
    """
    check_options("sweep", options, SweepOptions.__annotations__)
    plans = plans if callable(plans) else each_is("plans", plans, Plan)
    study, steps = begin_sweep(vlm, parts, plans, each_is("tasks", tasks, str), out, **options)
    for _ in steps:
        pass
    return study


def begin_sweep(
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
    until: str | Sequence[str] = (),
    memory_gb: float = MEMORY_GB,
    whole: bool = False,
    runtime: str | None = None,
) -> tuple[Study, Iterator[Step]]:
    """The study, and an iterator that runs the sweep: each step is a plan that has run on a shard of the examples.

    `n` is the largest number of examples per task, drawn with `seed`. Quantized weights and hidden states that
    plans share take at most `memory_gb`; with `plain`, plans share none. `storage` is the URL of a database for the
    trials, in place of a journal file in `out`.

    Methods that need calibration take it from `statistics`, by default computed on the calibration splits of the
    tasks. `until` may end the sweep early ("10min", "error<0.5%"); later examples then go to plans that still matter.
    Generation stops at the token after which an answer can no longer be right, unless `whole` asks for whole answers.
    With `runtime`, sizes are counted in the files that it loads.
    """
    check_is("vlm", vlm, VLM)
    vlm.check_weights()
    if vlm.model in HOLDING:
        raise UserError(
            f"{vlm.name} holds a plan: its scores would count as full precision; sweep outside of quantized()"
        )
    check_is("parts", parts, ComponentMap)
    for plan in plans if isinstance(plans, Sequence) else ():
        check_is("each of plans", plan, Plan)
        plan.check(parts)
    if not each_is("tasks", tasks, str):
        raise UserError("a sweep needs at least one task, such as 'vqa'")
    check_is_path("out", out)
    check_is("memory_gb", memory_gb, Real)
    if not memory_gb > 0:
        raise UserError(f"memory_gb must be above 0, not {memory_gb}")
    weights = dict(vlm.model.named_parameters())
    if any(weight.name not in weights for weight in parts.weights):
        raise UserError(f"these parts are those of {parts.model}; parts of {vlm.name} come from inspect(vlm)")
    limit = Until.parse(each_is("until", until, str))
    evaluated = [find_task(name, "evaluation", n, seed, whole) for name in dict.fromkeys(tasks)]
    check_distinct(evaluated, list(dict.fromkeys(tasks)))
    check_task_names([task.name for task in evaluated], parts)
    check_runs(vlm, evaluated)
    facts = comparability(vlm, evaluated, tasks, n, seed) | ({"whole_answers": True} if whole else {})
    check_tasks_fit(vlm, evaluated)
    study = Study.create(out, parts, [task.name for task in evaluated], facts, storage, runtime)
    questions.store(study.path, evaluated)
    if callable(plans):
        return study, run_plans(vlm, study, evaluated, plans(study), plain, statistics, limit, memory_gb)
    if statistics is None and isinstance(plans, Sequence):
        # a plan's key depends on its calibration data, so schemes must name the data before plans are queued
        schemes = list(dict.fromkeys(scheme for plan in plans for scheme in plan.distinct_schemes))
        named, statistics = with_calibration(vlm, parts, schemes, tasks, against=evaluated)
        with_data: dict[Scheme | None, Scheme | None] = {None: None, **dict(zip(schemes, named, strict=True))}
        plans = [Plan(tuple((name, with_data[one]) for name, one in plan.schemes)) for plan in plans]
    return study, run_plans(vlm, study, evaluated, plans, plain, statistics, limit, memory_gb)


def with_calibration(
    vlm: VLM,
    parts: ComponentMap,
    schemes: Sequence[Scheme],
    tasks: Sequence[str],
    n: int = 128,
    seed: int = 0,
    path: str | None = None,
    against: Iterable[Task] = (),
    cache_gb: float = CACHE_GB,
) -> tuple[list[Scheme], Statistics | None]:
    """The schemes, with their calibration data written into their settings, and the statistics if any need them.

    Schemes whose settings already name their calibration data are calibrated on those. Without a `path` it is "float",
    or "both" if a scheme needs it.
    """
    needing = [one for one in schemes if needs_data(one)]
    if not needing:
        return list(schemes), None
    named = {tuple(one.get(fact) for fact in ("calibration", "examples", "seed", "path")) for one in needing}
    if len(named) > 1:
        raise UserError("these plans were calibrated on different data; sweep those of each calibration separately")
    if None not in (data := named.pop()):
        tasks, n, seed, path = str(data[0]).split(","), int(data[1] or 0), int(data[2] or 0), str(data[3])
    path = path_for(needing, path)
    check_path(path, needing)
    cache = Cache(cache_folder(), cache_gb) if cache_gb > 0 else None
    kinds = {token_weighting(one) for one in needing}
    statistics = calibration_statistics(vlm, parts, tasks, n, seed, path, against, cache, importance=kinds)
    return [
        replace(one, settings=tuple({**dict(one.settings), **statistics.facts}.items())) if one in needing else one
        for one in schemes
    ], statistics
