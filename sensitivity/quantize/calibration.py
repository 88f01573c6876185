"""calibrate(): statistics of all layers from one pass of the calibration data, or of each block as a plan goes in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sensitivity.components import ComponentMap, Weight
from sensitivity.errors import UserError, unknown
from sensitivity.models import VLM
from sensitivity.plan import Setting
from sensitivity.quantize.cache import Cache
from sensitivity.quantize.curvature import Curvature
from sensitivity.quantize.fold import Absorber, absorbers
from sensitivity.quantize.linears import reads
from sensitivity.quantize.statistics import PATHS, Statistics
from sensitivity.quantize.tokens import PADDING, Batch, batches, disjoint, run
from sensitivity.tasks import Task
from sensitivity.tasks import task as find_task


def calibrate(
    vlm: VLM,
    parts: ComponentMap,
    tasks: Sequence[str],
    n: int = 128,
    seed: int = 0,
    path: str = "float",
    against: Iterable[Task] = (),
    cache: Cache | None = None,
) -> Statistics:
    """What the layers of `parts` see on n examples of the tasks' calibration splits, shared out among the tasks.

    `against` are the tasks that will be evaluated on, which must have no example and no image in common with these.
    """
    if path not in PATHS:
        raise unknown("calibration path", path, PATHS)
    names = list(dict.fromkeys(tasks))
    if not names or n < len(names):
        raise UserError(f"{n} calibration examples do not go round {len(names)} tasks; at least one each is needed")
    shares = [n // len(names) + (i < n % len(names)) for i in range(len(names))]
    data = [find_task(name, "calibration", share, seed) for name, share in zip(names, shares, strict=True)]
    disjoint(data, list(against))
    facts: dict[str, Setting] = {
        "calibration": ",".join(names),
        "examples": sum(len(task.examples) for task in data),
        "seed": seed,
        "data": ".".join(task.fingerprint for task in data),
        "path": path,
    }

    def trace() -> Mapping[str, Absorber]:
        few = [replace(data[0], examples=data[0].examples[:1])]
        return absorbers(vlm.model, parts, lambda: run(vlm, next(batches(vlm, few))))

    if path == "float":
        return Statistics(facts, _studied(vlm, parts, data, facts, cache), trace, cache)
    made: list[Batch] = []  # as inputs of the model; kept, since every block reads them again

    def gather(weights: Sequence[Weight]) -> Mapping[str, Curvature]:
        if not made:
            made.extend(batches(vlm, data))
        return collect(vlm, weights, made)

    return Statistics(facts, gather, trace, cache)


def _studied(
    vlm: VLM, parts: ComponentMap, data: Sequence[Task], facts: Mapping[str, Any], cache: Cache | None
) -> Callable[[Sequence[Weight]], Mapping[str, Curvature]]:
    """One pass over the float model, at once: later it may hold other weights."""
    inputs = {reads(weight): weight for weight in reversed(parts.weights)}

    def study() -> dict[str, Tensor]:
        found = collect(vlm, list(inputs.values()), batches(vlm, data))
        return {f"{name}|{key}": t for name, curvature in found.items() for key, t in curvature.tensors().items()}

    about = {**facts, "model": vlm.fingerprint, "dtype": str(vlm.model.dtype), "inputs": sorted(inputs)}
    tensors = study() if cache is None else cache.fetch({"statistics": about}, study, vlm.device)
    split: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        split.setdefault(name.rpartition("|")[0], {})[name.rpartition("|")[2]] = tensor
    known = {name: Curvature.of(of_one) for name, of_one in split.items()}
    return lambda weights: {reads(weight): known[reads(weight)] for weight in weights}


def collect(vlm: VLM, weights: Iterable[Weight], data: Iterable[Batch]) -> dict[str, Curvature]:
    """What the inputs of some weights look like on the model as it stands, batch by batch."""
    leaders = {reads(weight): weight for weight in weights}
    found = {name: Curvature(w.cols, vlm.device) for name, w in leaders.items()}
    now: list[Batch] = []

    def watch(name: str, part: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            modality, counts = now[0].modality(part, x.shape[:-1])
            flat = x.reshape(-1, x.shape[-1])
            found[name].add(flat if modality is None or not counts[PADDING] else flat[modality != PADDING])
            found[name].modalities += counts

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for name, weight in leaders.items():
            module = vlm.model.get_submodule(weight.module)
            handle = module.register_forward_pre_hook(watch(name, weight.part), with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in data:
            now[:] = [batch]
            run(vlm, batch)
    for name, weight in leaders.items():
        found[name].check(weight.name)
    return found
