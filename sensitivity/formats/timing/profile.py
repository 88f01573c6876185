"""profile(): times each layer of a model in each layout of a runtime, and the whole model, and stores the times."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sensitivity.formats.openvino.export import STORED
from sensitivity.formats.openvino.layer_graph import LayerGraph
from sensitivity.formats.timing.intervals import STAGES as STAGES_OF_A_ROUND
from sensitivity.formats.timing.kept_times import keep
from sensitivity.formats.timing.machine import machine, versions_of
from sensitivity.formats.timing.opened import CHECK
from sensitivity.formats.timing.rows_at_once import rows_at_once
from sensitivity.formats.timing.side_by_side import full_precision
from sensitivity.formats.timing.timed_process import Asked, Round, timed_process
from sensitivity.measure.generate.batches import batches
from sensitivity.models.config_only import without_weights
from sensitivity.models.discover import inspect
from sensitivity.models.loading import load
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.layer_times import (
    NATIVE,
    RESIDENT,
    STAGES,
    LayerTimes,
    check_timed,
    layout_of,
    tokens_at_once,
)
from sensitivity.spec.runtimes.loadable import restrict
from sensitivity.spec.sizes import GB
from sensitivity.spec.stage import each
from sensitivity.tasks.table import task as find_task

ROUNDS = 12
PROMPTS = 32  # examples whose right answers give the usual length of an answer


@dataclass
class _Layers:
    """The layers of one shape in one layout: their graph, and the numbers of tokens at which it is timed."""

    graph: LayerGraph
    key: tuple[int, int, str]
    at_once: list[int]


def profile(
    model: str,
    schemes: Sequence[Scheme],
    runtime: str = "openvino",
    task: str = "vqa",
    n: int = ROUNDS,
    *,
    threads: int = 0,
) -> LayerTimes:
    """Time the layers of a model in the layouts of some schemes, in turn with the whole model in full precision.

    A layer is timed in as many copies as the model has of it, so that weights are read from memory and not from the
    processor's cache. The time outside of layers is the time of the whole model minus that of its layers. The times
    are stored on this machine, where `recommend` finds them.
    """
    parts, tokens = checked(model, schemes, runtime, task)
    threads = threads or torch.get_num_threads()
    at_once = rows_at_once(load(model, config_only=True), parts, first_inputs(model, task))
    with full_precision(model, runtime, "float32") as full:
        at_once = _as_in_graphs(at_once, Path(full))
        asked = Asked(full, model, runtime, "float32", threads, task, 1, 0)
        with timed_process(asked) as whole:
            first = whole.round(0)
            tokens |= {"image": first.image_tokens, "prompt": first.prompt.count}
            layers = _layers(parts, schemes, runtime, at_once, tokens, threads)
            rounds, times = [], dict[tuple[int, int, str, int], list[float]]()
            for _ in each(range(n), "timing", "rounds", n):
                rounds.append(whole.round(0))
                for one in layers:
                    for count in one.at_once:
                        times.setdefault((*one.key, count), []).append(_ms(*one.graph.seconds(count), threads))
            memory = whole.memory()
    medians = {key: float(np.median(values)) for key, values in times.items()}
    nothing = dict.fromkeys(STAGES, 0.0)
    found = LayerTimes(
        runtime, dict(machine()), threads, versions_of(runtime), task, at_once, tokens, nothing, 0.0, medians
    )
    native = Plan.uniform(parts, None)
    of_layers = {stage: found.plan_cost(parts, native, f"ms_per_{stage}") for stage in STAGES}
    rest = {stage: _whole(rounds, stage, threads) - of_layers[stage] for stage in STAGES}
    held = memory["anonymous"] + memory["mapped"] if memory else 0
    resident = held - GB * found.plan_cost(parts, native, RESIDENT)
    found = replace(found, rest=rest, resident=resident)
    keep(parts, found)
    return found


def checked(model: str, schemes: Sequence[Scheme], runtime: str, task: str) -> tuple[ComponentMap, dict[str, int]]:
    """Make every check before any slow work; returns the model's parts and the number of tokens of an answer."""
    check_timed(runtime)
    examples = find_task(task, "evaluation", PROMPTS)
    if examples.gallery:
        raise UserError(f"the task {task} ranks captions; name one with answers to generate, as --task vqa")
    parts = inspect(model, by="part")
    restrict(parts, schemes, runtime)
    check_runs_here(model, runtime)
    vlm = without_weights(model)
    lengths = [len(target) for batch in batches(vlm, examples, plain=True) for target in batch.targets]
    return parts, {"answer": int(np.median(lengths))}


def first_inputs(model: str, task: str) -> dict[str, Tensor]:
    """The processor's output for the example whose answer is timed."""
    (batch,) = batches(without_weights(model), find_task(task, "evaluation", 1), plain=True)
    return batch.inputs


def check_runs_here(model: str, runtime: str) -> None:
    """Raise an error if the runtime is not installed, or cannot run the model."""
    CHECK[runtime](model)


def _as_in_graphs(at_once: dict[str, int], folder: Path) -> dict[str, int]:
    """The counts, with 0 for weights that no graph reads, as in vision layers after the one whose output is used."""
    graphs: dict[str, dict[str, str]] = json.loads((folder / STORED).read_bytes())
    kept = {constant.partition(":")[0] for constants in graphs.values() for constant in constants}
    return {name: count if name in kept else 0 for name, count in at_once.items()}


def _layers(
    parts: ComponentMap,
    schemes: Sequence[Scheme],
    runtime: str,
    at_once: dict[str, int],
    tokens: dict[str, int],
    threads: int,
) -> list[_Layers]:
    """A warmed-up graph for each shape and layout, with the numbers of tokens at which the model runs it."""
    needed: dict[tuple[int, int], set[int]] = {}
    copies: Counter[tuple[int, int]] = Counter()
    example: dict[tuple[int, int], Weight] = {}
    for weight in parts.weights:
        shape = weight.rows, weight.cols
        example.setdefault(shape, weight)
        copies[shape] += 1
        counts = {tokens_at_once(weight, stage, at_once, tokens) for stage in STAGES} - {0}
        needed.setdefault(shape, set()).update(counts)
    found = []
    for shape, weight in example.items():
        options: dict[str, Scheme | None] = {NATIVE: None}
        for scheme in restrict(parts, schemes, runtime)[0]:
            options.setdefault(layout_of(weight, scheme, runtime), scheme)
        for layout, option in options.items():
            if needed[shape] and _divides(weight, option):
                graph = LayerGraph(weight, option, copies[shape], threads)
                found.append(_Layers(graph, (*shape, layout), sorted(needed[shape])))
    for one in found:
        for count in one.at_once:
            one.graph.seconds(count)  # the first run is slower, and is not counted
    return found


def _divides(weight: Weight, scheme: Scheme | None) -> bool:
    """Whether the group size of a scheme divides the number of columns of a weight."""
    return scheme is None or isinstance(scheme.group, str) or weight.cols % scheme.group == 0


def _ms(wall: float, cpu: float, threads: int) -> float:
    """Wall-clock milliseconds; with one thread, CPU time, which is the wall-clock time of an idle machine."""
    return 1e3 * (cpu if threads == 1 else wall)


def _whole(rounds: Sequence[Round], stage: str, threads: int) -> float:
    """The median milliseconds of a stage of the whole model: for one image, the whole prompt, or one new token."""
    of = dict(zip(STAGES, STAGES_OF_A_ROUND.values(), strict=True))[stage]
    each = [_ms(of(one).wall, of(one).cpu, threads) / (1 if stage == "prompt" else of(one).count) for one in rounds]
    return float(np.median(each))
