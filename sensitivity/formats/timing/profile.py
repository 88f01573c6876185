"""profile_layers(): times each layer of a model in each layout of a runtime, inside the whole model; stores them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sensitivity.formats.halved.tracing import kept as kept_traces
from sensitivity.formats.openvino.exporter import STORED
from sensitivity.formats.table import write
from sensitivity.formats.timing.intervals import STAGES as STAGES_OF_A_ROUND
from sensitivity.formats.timing.kept_times import keep
from sensitivity.formats.timing.machine import this_machine, versions_of
from sensitivity.formats.timing.open_models import CHECK
from sensitivity.formats.timing.rows_at_once import rows_by_weight
from sensitivity.formats.timing.timed_process import Asked, Counted, Round, timed_model
from sensitivity.formats.writing.job import Job
from sensitivity.formats.writing.unfinished import temporary_folder
from sensitivity.measure.generate.batches import batches_by_image
from sensitivity.models.config_only import without_weights
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.layer_times import (
    LAYOUTS,
    NATIVE,
    STAGES,
    Key,
    LayerTimes,
    check_timed,
    half_of,
    is_read,
    layout_of,
    tokens_at_once,
)
from sensitivity.spec.runtimes.loadable import restrict
from sensitivity.spec.runtimes.rules import refusals
from sensitivity.spec.stage import each
from sensitivity.tasks.table import task as find_task

ROUNDS = 12
PROMPTS = 32  # examples whose right answers give the usual length of an answer


def profile_layers(
    model: str,
    schemes: Sequence[Scheme],
    runtime: str = "openvino",
    task: str = "vqa",
    n: int = ROUNDS,
    *,
    threads: int = 0,
) -> LayerTimes:
    """Time the layers of a model in the layouts of some schemes, inside the whole model.

    For each layout the model is written with all weights in it and run, while the runtime counts the time of each
    layer: alone, a layer would find other things in the processor's cache. Each runs in turn with full precision: where
    that was slower than in all rounds together, the machine was slow, and the times are divided by the ratio. The time
    outside of layers is the time of the whole model minus that of its layers. The times are stored on this machine,
    where `recommend` finds them.
    """
    parts, tokens = checked(model, schemes, runtime, task)
    at_once = rows_by_weight(load(model, config_only=True), parts, first_inputs(model, task))
    threads = threads or torch.get_num_threads()
    linears = inspect(model, by="linear")
    plans = in_layouts(linears, schemes, runtime)
    with _written(model, linears, plans, runtime) as folders:
        at_once = _as_in_graphs(at_once, folders[NATIVE])
        full = Asked(str(folders[NATIVE]), model, runtime, "float32", threads, task, 1, 0)
        asked = {layout: replace(full, model=str(folder), counted=True) for layout, folder in folders.items()}
        beside, counted = _in_turn(full, asked, n)
    rounds = [one for several in beside.values() for one in several]
    tokens |= {"image": rounds[0].image_tokens, "prompt": rounds[0].prompt.count}
    layers, memory = dict[Key, float](), dict[tuple[str, str], float]()
    for layout, plan in plans.items():
        slower = {stage: _whole(beside[layout], stage, threads) / _whole(rounds, stage, threads) for stage in STAGES}
        layers |= _by_shape(linears, plan, runtime, _at_usual_speed(slower, counted[layout]["layers"]), at_once, tokens)
        quantized = [w for c in linears.components if plan[c.name] for w in c.weights if is_read(w, at_once, tokens)]
        memory |= _per_weight(quantized, layout, counted[NATIVE]["memory"], counted[layout]["memory"])
    found = LayerTimes(
        runtime, dict(this_machine()), threads, versions_of(runtime), task, at_once, tokens, dict.fromkeys(STAGES, 0.0),
        sum(counted[NATIVE]["memory"].values()), memory, layers,
    )  # fmt: skip
    native = Plan.uniform(parts, None)
    of_layers = {stage: found.plan_cost(parts, native, f"ms_per_{stage}") for stage in STAGES}
    found = replace(found, rest={stage: _whole(rounds, stage, threads) - of_layers[stage] for stage in STAGES})
    keep(parts, found)
    return found


def checked(model: str, schemes: Sequence[Scheme], runtime: str, task: str) -> tuple[ComponentMap, dict[str, int]]:
    """Make every check before any slow work; returns the model's components and the number of tokens of an answer."""
    check_timed(runtime)
    examples = find_task(task, "evaluation", PROMPTS)
    if examples.gallery:
        raise UserError(f"the task {task} ranks captions; name one with answers to generate, as --task vqa")
    parts = inspect(model, by="part")
    restrict(parts, schemes, runtime)
    check_runs_here(model, runtime)
    vlm = without_weights(model)
    lengths = [len(target) for batch in batches_by_image(vlm, examples, plain=True) for target in batch.targets]
    return parts, {"answer": int(np.median(lengths))}


def first_inputs(model: str, task: str) -> dict[str, Tensor]:
    """The processor's output for the example whose answer is timed."""
    (batch,) = batches_by_image(without_weights(model), find_task(task, "evaluation", 1), plain=True)
    return batch.inputs


def check_runs_here(model: str, runtime: str) -> None:
    """Raise an error if the runtime is not installed, or cannot run the model."""
    CHECK[runtime](model)


def _as_in_graphs(at_once: dict[str, int], folder: Path) -> dict[str, int]:
    """The counts, with 0 for weights that no graph reads, such as those of vision layers behind the last one used."""
    graphs: dict[str, dict[str, str]] = json.loads((folder / STORED).read_bytes())
    kept = {constant.partition(":")[0] for constants in graphs.values() for constant in constants}
    return {name: count if name in kept else 0 for name, count in at_once.items()}


def in_layouts(linears: ComponentMap, schemes: Sequence[Scheme], runtime: str) -> dict[str, Plan]:
    """Layout -> the plan in which every weight that can have this layout has it.

    Weights are rounded to nearest, since times do not depend on values.
    """
    plans = {NATIVE: Plan.uniform(linears, None)}
    for scheme in restrict(linears, schemes, runtime)[0]:
        plain = Scheme("rtn", scheme.bits, scheme.group, scheme.symmetric)
        fits = {c.name: None if any(refusals(c, plain, runtime)) else plain for c in linears.components}
        plans.setdefault(LAYOUTS[runtime](plain), Plan.of(linears, fits))
    return plans


@contextmanager
def _written(model: str, linears: ComponentMap, plans: Mapping[str, Plan], runtime: str) -> Iterator[dict[str, Path]]:
    """A temporary export of each plan."""
    with temporary_folder("profile") as space, kept_traces(space / "traces"):
        folders = {layout: space / layout for layout in plans}
        for layout in each(list(plans), "writing", "layouts", len(plans)):
            write(Job(model, linears, plans[layout], dtype=torch.float32), folders[layout], runtime)
        yield folders


def _in_turn(full: Asked, asked: Mapping[str, Asked], n: int) -> tuple[dict[str, list[Round]], dict[str, Counted]]:
    """Time each layout in turn with full precision; returns full precision's rounds beside each, and what was counted.

    Only two models are in memory at once.
    """
    beside, found = dict[str, list[Round]](), dict[str, Counted]()
    with timed_model(full) as whole:
        whole.round(0)  # the first is slower, and not counted
        for layout in each(list(asked), "timing", "layouts", len(asked)):
            with timed_model(asked[layout]) as inside:
                inside.round(0)
                beside[layout] = []
                for _ in range(n):
                    beside[layout].append(whole.round(0))
                    inside.round(0)
                found[layout] = inside.counted()
    return beside, found


def _at_usual_speed(
    slower: Mapping[str, float], seconds: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Stage -> weight -> seconds, as if the machine had been as fast as in all rounds together."""
    return {
        stage: {name: took / slower[stage] for name, took in of.items()}
        for stage, of in zip(STAGES, seconds.values(), strict=True)
    }


def _by_shape(
    linears: ComponentMap,
    plan: Plan,
    runtime: str,
    seconds: Mapping[str, Mapping[str, float]],
    at_once: Mapping[str, int],
    tokens: Mapping[str, int],
) -> dict[Key, float]:
    """The milliseconds of a plan's layers: of each shape, the mean."""
    found: dict[Key, list[float]] = {}
    quantized = any(scheme for _, scheme in plan.schemes)
    for component in linears.components:
        for weight in component.weights:
            layout = layout_of(weight, plan[component.name], runtime)
            if layout == NATIVE and quantized:  # the layout does not fit its shape
                continue
            for stage, took in seconds.items():
                if count := tokens_at_once(weight, stage, at_once, tokens):
                    if weight.name not in took:
                        raise UserError(f"{runtime} does not report the time of {weight.name}")
                    key = weight.rows, weight.cols, layout, count
                    found.setdefault(key, []).append(1e3 * max(took[weight.name], 0.0))
    return {key: float(np.mean(values)) for key, values in found.items()}


def _per_weight(
    weights: Sequence[Weight], layout: str, full: Mapping[str, int], held: Mapping[str, int]
) -> dict[tuple[str, str], float]:
    """For each half, the bytes in memory that a weight in a layout adds to full precision; these weights were in it."""
    found = {}
    for half in full:
        if inside := sum(weight.numel for weight in weights if half_of(weight) == half):
            found[half, layout] = (held[half] - full[half]) / inside
    return found


def _whole(rounds: Sequence[Round], stage: str, threads: int) -> float:
    """The median milliseconds of a stage of the whole model: for one image, the whole prompt, or one new token.

    With one thread it is CPU time, which is the wall-clock time of an idle machine.
    """
    of = dict(zip(STAGES, STAGES_OF_A_ROUND.values(), strict=True))[stage]
    spent = [(of(one).cpu if threads == 1 else of(one).wall, of(one).count) for one in rounds]
    return 1e3 * float(np.median([took / (1 if stage == "prompt" else count) for took, count in spent]))
