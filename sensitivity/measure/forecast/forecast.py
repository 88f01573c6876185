"""Forecast: the time, disk and memory of a sweep, from a config, a few examples and short measurements."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import pandas as pd
import torch

from sensitivity.measure.attribution.weight_errors import groups_that_fit
from sensitivity.measure.forecast.calibrating import calibration_seconds, tweaking_seconds
from sensitivity.measure.forecast.cost_model import CostModel, TaskSample
from sensitivity.measure.forecast.hardware import Hardware
from sensitivity.measure.forecast.rounding import in_queue_order, rounding_seconds
from sensitivity.measure.loop import MEMORY_GB
from sensitivity.measure.memory.out_of_memory import room_beside
from sensitivity.measure.memory.weight_codes import BYTES_PER_CODE
from sensitivity.measure.shards import MAX_IMAGES, shard_ends
from sensitivity.models.loading import device_of, dtype_of
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import input_of
from sensitivity.quantize.methods import needs_data, token_weighting, weights_of
from sensitivity.spec.components import PARTS, ComponentMap
from sensitivity.spec.plan import KEEP, Plan, Scheme, scheme_of
from sensitivity.spec.sizes import GB, bytes_in_words
from sensitivity.study.answers import COLUMNS
from sensitivity.tasks.examples.types import Task

LOADING = 1.0e9  # bytes of weights that are read per second
LATER = 50e6  # bytes of memory for libraries that are imported only during the sweep
STORING = 0.015  # seconds to store a trial's examples and scores, per shard
JOURNAL = (1100, 300, 700)  # bytes that Optuna writes per trial, per shard, and per task in a shard


@dataclass(frozen=True)
class Forecast:
    """The expected cost of a sweep.

    `seconds` assumes that answers equal the right ones or a neighboring plan's, so that drafts are accepted; `slowest`
    assumes that every plan generates all of its answers token by token, up to the task's limit.
    """

    plans: int
    examples: int
    images: int
    flops: float  # per second, in products of this model's shapes
    seconds: Mapping[str, float]
    slowest: float
    disk: Mapping[str, float]
    host: Mapping[str, float]
    device: Mapping[str, float] = field(default_factory=dict)  # empty where the device is the host
    measured: int = 0  # plans that are measured already, which `plans` does not count

    def to_json(self) -> dict[str, object]:
        """The forecast with its totals, as JSON."""
        total = {name: sum(getattr(self, name).values()) for name in ("seconds", "disk", "host", "device")}
        return {**asdict(self), "total": total}

    def rows(self) -> list[tuple[str, str, str]]:
        """A table's rows: the resource, its amount, and what this is the sum of."""
        total, slowest = _span(sum(self.seconds.values())), _span(self.slowest)
        span = total if slowest == total else f"{total} (at most {slowest})"
        lines = [("time", span, _summed(self.seconds, _span))]
        for name in ("disk", "host", "device"):
            amounts = getattr(self, name)
            if amounts:
                label = name if name == "disk" else f"{name} memory"
                lines.append((label, bytes_in_words(sum(amounts.values())), _summed(amounts, bytes_in_words)))
        return lines


def forecast_sweep(
    vlm: VLM,
    parts: ComponentMap,
    plans: Sequence[Plan],
    tasks: Sequence[Task],
    calibration: int = 128,
    device: str = "cpu",
    dtype: str | None = None,
    plain: bool = False,
    cache_gb: float = 8.0,
    memory_gb: float = MEMORY_GB,
    scores: Sequence[str] = (),
    measured: Container[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> Forecast:
    """The expected cost of running these plans, full precision included, on a device; measures for some seconds.

    scores: those of SCORES, from calibration, that components are given before the sweep, as the command `plan` does.
    measured: the keys of plans that are measured already; scores are computed for their schemes too, nothing else.
    """
    every, plans = plans, [plan for plan in plans if plan.key not in measured]
    kind = _dtype(vlm, parts, device, dtype)
    resident, hardware = _resident(), Hardware(_measured_device(device), kind, clock)
    model = CostModel(vlm, parts, hardware)
    # one plan that prunes is enough: all are forecast as if they read whole prompts
    whole_prompts = plain or any(plan.prunes for plan in plans)
    samples = [TaskSample.of(vlm, task, shard_ends(tasks), whole_prompts, clock) for task in tasks]
    calibrating = every if scores else plans
    used = list(dict.fromkeys(scheme for plan in calibrating for _, scheme in plan.schemes if scheme))
    schemes = list(dict.fromkeys(weights_of(scheme) for scheme in used if scheme.method != KEEP))
    passes = [model.passes(sample) for sample in samples]
    runs = {part: float(len(plans)) for part in PARTS} if plain else _runs(parts, plans)
    generating = len(plans) * sum(model.generation_seconds(sample) for sample in samples)
    calibrated = [scheme for scheme in schemes if needs_data(scheme)]
    calibrates = bool(scores) or any(map(needs_data, used))
    inputs = {input_of(weight): weight for weight in parts.weights if calibrates and not weight.is_embedding}
    grams = sum(4.0 * weight.cols**2 for weight in inputs.values())
    # seconds of one calibration example: for its forward pass, and for adding its inputs to the Gram matrices
    forward = sum(shared for of_parts in passes for shared, _ in of_parts.values()) / sum(s.examples for s in samples)
    tokens = max(sum(sample.prompt_tokens for sample in samples) // len(samples), 1)
    products = sum(hardware.matmul(tokens, w.cols, w.cols) for w in inputs.values())
    groups = len(groups_that_fit(parts, len(schemes)))
    seconds = {
        "loading": parts.numel * kind.itemsize / LOADING,
        "examples": sum(sample.preprocessing * sample.images for sample in samples if plans),
        **calibration_seconds(used, calibration, forward, products, len(plans), scores, groups),
        "tweaking norms": tweaking_seconds(parts, plans, calibration, forward),
        "quantizing": sum(_quantizing(parts, plans, scheme, hardware) for scheme in schemes)
        + len({token_weighting(scheme) for scheme in calibrated})
        * sum(hardware.factorizing(w.cols) for w in inputs.values()),
        "running": sum(_running(*both, runs, len(plans)) for both in zip(samples, passes, strict=True)),
        "rounding": rounding_seconds(parts, plans, samples, hardware, plain),
        "storing": STORING * len(plans) * len(shard_ends(tasks)),
    }
    work = _work(parts, model, samples, None if plain else memory_gb * GB, len(schemes)) | {"statistics": grams}
    host = {
        "Python": float(resident + LATER),
        "examples": sum(sample.bytes * min(sample.images, MAX_IMAGES) for sample in samples),
    }
    codes = BYTES_PER_CODE * sum(w.numel for w in parts.weights) * len(calibrated)
    cached = min(cache_gb * GB, grams + codes) if inputs else 0.0
    return Forecast(
        plans=len(plans),
        examples=sum(sample.examples for sample in samples),
        images=sum(sample.images for sample in samples),
        flops=hardware.flops,
        seconds=seconds,
        slowest=sum(seconds.values()) + generating,
        disk={**_stored(parts, tasks, plans, len(shard_ends(tasks))), "statistics and weights": cached},
        host=host | (work if hardware.device.type == "cpu" else {}),
        device={} if hardware.device.type == "cpu" else work,
        measured=len(every) - len(plans),
    )


def _work(
    parts: ComponentMap, model: CostModel, samples: Sequence[TaskSample], shared_bytes: float | None, schemes: int
) -> dict[str, float]:
    """Bytes on the device that runs the model; plans share up to `shared_bytes`, or nothing if that is None."""
    weights, itemsize = sum(w.numel for w in parts.weights), model.hardware.dtype.itemsize
    quantized = states = 0.0
    if shared_bytes is not None:
        # codes, and dequantized weights. Of the latter, memory holds most either while a plan runs (all of its weights,
        # less what the model's own save in 16 bits, see OwnWeights) or between two plans (as many as plans may share)
        dense = weights * itemsize
        saved = weights * (itemsize - 2) if parts.native_bits == 16 else 0
        quantized = min(shared_bytes / 2, schemes * BYTES_PER_CODE * weights) + max(
            dense - saved, min(dense, shared_bytes / 2)
        )
        room = room_beside(model.hardware.device, 2 * weights * itemsize)  # the model's own, and a plan's
        states = min(shared_bytes / 2, room, sum(model.prefix_cache_bytes(sample) for sample in samples))
    return {
        "weights": float(parts.numel * itemsize),
        "quantized weights": quantized,
        "hidden states": states,
        "activations": max(model.activation_bytes(sample) for sample in samples),
    }


def _measured_device(device: str) -> torch.device:
    """The device that is measured; for `auto` one of those that accelerate would use."""
    return device_of(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(vlm: VLM, parts: ComponentMap, device: str, dtype: str | None) -> torch.dtype:
    """The dtype that load() would choose: the given one, else as stored, but float32 for embedded models on a CPU."""
    if dtype is None and vlm.name.startswith("embedded:") and device == "cpu":
        return torch.float32
    stored = getattr(vlm.model.config, "dtype", None)
    loaded: torch.dtype = dtype_of(dtype) or stored or getattr(torch, f"float{parts.native_bits}")
    return loaded


def _runs(parts: ComponentMap, plans: Sequence[Plan]) -> dict[str, float]:
    """How often each part is computed, in full passes, if neighboring plans share their common prefix."""
    ordered = in_queue_order(plans)
    runs = dict.fromkeys(PARTS, 0.0)
    whole = {part: sum(w.numel for w in parts.weights if w.part == part) for part in PARTS}
    for place, component in enumerate(parts.components):
        paths = [plan.schemes[: place + 1] for plan in ordered]
        times = bool(paths) + sum(one != other for one, other in pairwise(paths))
        runs[component.part] += times * component.numel / whole[component.part]
    return runs


def _running(
    sample: TaskSample, passes: Mapping[str, tuple[float, float]], runs: Mapping[str, float], plans: int
) -> float:
    """Seconds to run all plans: shared work once per distinct prefix, the rest once per plan."""
    return sum(
        shared * (runs[part] if sample.shares(part) else plans) + own * plans for part, (shared, own) in passes.items()
    )


def _quantizing(parts: ComponentMap, plans: Sequence[Plan], scheme: Scheme, hardware: Hardware) -> float:
    """Seconds to quantize, with one scheme, every weight to which some plan gives it."""
    used = {name for plan in plans for name, given in plan.schemes if given and weights_of(given) == scheme}
    weights = (w for c in parts.components if c.name in used for w in c.weights)
    return sum(hardware.quantizing(scheme_of(w, scheme), w) for w in weights)


def _stored(parts: ComponentMap, tasks: Sequence[Task], plans: Sequence[Plan], shards: int) -> dict[str, float]:
    """Bytes of the trials' files, if all answers are right, and of the journal, which holds each plan four times."""
    # random scores, since equal ones would compress to almost nothing
    draw = torch.rand(sum(len(task.examples) for task in tasks), 2, dtype=torch.float64).tolist()
    every = [(task, example) for task in tasks for example in task.examples]
    rows = [
        (task.name, e.id, e.cluster, e.kind, score, nll, e.answers[0] if e.answers else "")
        for (task, e), (score, nll) in zip(every, draw, strict=True)
    ]
    stream = io.BytesIO()
    pd.DataFrame(rows, columns=list(COLUMNS)).to_parquet(stream, index=False)
    trial, shard, scores = JOURNAL
    lines = sum(trial + 4 * len(plan.dumps()) + shards * (shard + scores * len(tasks)) for plan in plans)
    return {"examples": float(stream.tell() * len(plans)), "journal": float(lines + len(json.dumps(parts.to_json())))}


def _resident() -> int:
    """Bytes of memory that this process holds before anything is loaded."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 600 << 20


def _summed(amounts: Mapping[str, float], show: Callable[[float], str]) -> str:
    """The amounts that are not zero, each with its name."""
    return ", ".join(f"{name} {show(amount)}" for name, amount in amounts.items() if amount)


def _span(seconds: float) -> str:
    """A duration as text."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
