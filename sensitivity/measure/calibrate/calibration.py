"""calibration_statistics(): statistics of each layer's inputs, from one pass over the data or block by block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sensitivity.measure.calibrate.absorbers import Absorber, absorbers_of
from sensitivity.measure.calibrate.blockwise import BlockwisePass, Installed
from sensitivity.measure.calibrate.both_paths import gather_both
from sensitivity.measure.calibrate.cache import Cache
from sensitivity.measure.calibrate.collecting import Data, collect
from sensitivity.measure.calibrate.statistics import Gather, Statistics, check_path
from sensitivity.measure.gradients.backward import in_rows_that_fit
from sensitivity.measure.gradients.fisher import Fisher
from sensitivity.measure.gradients.token_importance import TokenWeights, importance_of
from sensitivity.measure.memory.out_of_memory import run_or_halve
from sensitivity.measure.passes.token_batches import (
    ROWS,
    TokenBatch,
    answer_batches,
    calibration_pass,
    check_disjoint,
)
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import input_of
from sensitivity.quantize.methods import UNIFORM
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Setting
from sensitivity.spec.sizes import GB
from sensitivity.spec.stage import each
from sensitivity.tasks.examples.types import Example, Task
from sensitivity.tasks.table import task as find_task

GRAM_BYTES = 1 << 30  # bytes of Gram matrices in memory at once; one block of a 7B model has 0.7 GB


def calibration_statistics(
    vlm: VLM,
    parts: ComponentMap,
    tasks: Sequence[str],
    n: int = 128,
    seed: int = 0,
    path: str = "float",
    against: Iterable[Task] = (),
    cache: Cache | None = None,
    gram_bytes: int = GRAM_BYTES,
    importance: Collection[str] = (),
) -> Statistics:
    """Statistics of the inputs of all layers in `parts`, on n calibration examples divided among the tasks.

    Each `importance` beside "uniform" gives statistics of its own, in which every token has its own weight. The weights
    come from the float model, whatever the path.

    `against` lists the evaluation tasks, which must share no example and no image with the calibration data. Gram
    matrices that exceed `gram_bytes` bytes together are computed a few blocks at a time, when they are asked for.
    """
    check_path(path)
    data = calibration_examples(tasks, n, seed)
    check_disjoint(data, list(against))
    facts = calibration_facts(tasks, data, seed, path)

    def find_absorbers() -> Mapping[str, Absorber]:
        one_example = [replace(data[0], examples=data[0].examples[:1])]
        return absorbers_of(vlm.model, parts, lambda: calibration_pass(vlm, next(answer_batches(vlm, one_example))))

    def in_batches(rows: int) -> Iterable[TokenBatch]:
        examples = sum(len(task.examples) for task in data)
        return each(
            answer_batches(vlm, data, rows), "calibrating", "examples", examples, lambda batch: len(batch.examples)
        )

    def passes() -> Iterator[TokenBatch]:
        for batch in answer_batches(vlm, data, ROWS // 4):  # hooks on attention hold the probabilities of all heads
            with torch.inference_mode():
                calibration_pass(vlm, batch)
            yield batch

    token_weights: dict[str, TokenWeights | None] = {UNIFORM: None}
    token_weights |= _token_weights(vlm, parts, in_batches, sorted(set(importance) - {UNIFORM}))
    origin = {**facts, "model": vlm.fingerprint, "dtype": str(vlm.model.dtype)} if path == "float" else None
    gathers = {
        kind: _gather(vlm, parts, in_batches, path, origin, kind, weights, cache, gram_bytes)
        for kind, weights in token_weights.items()
    }
    layers = [weight for weight in parts.weights if not weight.is_embedding]
    fisher = Fisher(vlm, layers, in_batches).of
    return Statistics(facts, gathers.pop(UNIFORM), find_absorbers, cache, gathers, fisher, origin, passes)


def calibration_facts(tasks: Sequence[str], data: Sequence[Task], seed: int, path: str) -> dict[str, Setting]:
    """What schemes record of their calibration."""
    return {
        "calibration": ",".join(dict.fromkeys(tasks)),
        "examples": sum(len(task.examples) for task in data),
        "seed": seed,
        "data": ".".join(task.fingerprint for task in data),
        "path": path,
    }


def _gather(
    vlm: VLM,
    parts: ComponentMap,
    data: Data,
    path: str,
    origin: Mapping[str, object] | None,
    importance: str,
    token_weights: TokenWeights | None,
    cache: Cache | None,
    gram_bytes: int,
) -> Gather:
    """The `Gather` for one kind of importance, on one calibration path."""
    if path == "both":
        return gather_both(vlm, parts, data, token_weights)
    if path == "exposed":
        return gather_exposed(vlm, parts, data, token_weights)
    kind = {} if token_weights is None else {"importance": importance}
    return gather_float(vlm, parts, data, {**(origin or {}), **kind}, cache, gram_bytes, token_weights)


def calibration_examples(tasks: Sequence[str], n: int, seed: int) -> list[Task]:
    """n calibration examples, divided among the tasks."""
    names = list(dict.fromkeys(tasks))
    if not names or n < len(names):
        raise UserError(f"{n} calibration examples are too few for {len(names)} tasks; each needs at least one")
    counts = [n // len(names) + (i < n % len(names)) for i in range(len(names))]
    return [_on_many_images(name, count, seed) for name, count in zip(names, counts, strict=True)]


def _on_many_images(name: str, n: int, seed: int) -> Task:
    """n calibration examples of one task; where several share an image, of as many images as can be."""
    drawn = find_task(name, "calibration", n, seed)
    images = len({example.cluster for example in drawn.examples})
    if images < len(drawn.examples):
        drawn = find_task(name, "calibration", n * -(-len(drawn.examples) // images), seed)
    return replace(drawn, examples=over_images(drawn.examples, n))


def over_images(examples: Sequence[Example], n: int) -> tuple[Example, ...]:
    """n examples that show as many images as they can: one of each image, then a second one, and so on.

    Questions to one image say much the same of the layers that read it. Of the first image the first example is taken,
    of the next one its second, so that all kinds of questions are there.
    """
    of_image: dict[str, list[Example]] = {}
    for example in examples:
        of_image.setdefault(example.cluster, []).append(example)
    images = list(of_image.values())
    turns = range(max(map(len, images), default=0))
    taken = [one[(turn + place) % len(one)] for turn in turns for place, one in enumerate(images) if turn < len(one)]
    return tuple(taken[:n])


def _token_weights(vlm: VLM, parts: ComponentMap, data: Data, kinds: Sequence[str]) -> dict[str, TokenWeights]:
    """The token weights of some kinds of importance; kinds that observe the same share one pass over the data."""
    if not kinds or vlm.device.type == "meta":  # a forecast has no weights, and asks for no values
        return {kind: {} for kind in kinds}
    layers = [weight for weight in parts.weights if not weight.is_embedding]
    return in_rows_that_fit(vlm, data, lambda of_pass: importance_of(vlm, layers, of_pass(), kinds))


class CalibrationBatches:
    """Runs calibration data through a model, in batches that fit on the device.

    Statistics are sums over batches, so after an out-of-memory error they start from zero, with smaller batches.
    """

    def __init__(
        self, vlm: VLM, parts: ComponentMap, data: Data, exposed: bool, token_weights: TokenWeights | None = None
    ) -> None:
        self.rows, self.token_weights = ROWS, token_weights
        self.vlm, self.parts, self.data, self.exposed = vlm, parts, data, exposed
        self.blockwise: BlockwisePass | None = None

    def by_full_passes(self, weights: Sequence[Weight]) -> Mapping[str, Curvature]:
        """Statistics of some weights' inputs, by full forward passes."""
        return self._halving_batches(
            lambda: collect(self.vlm, weights, self.data(self.rows), token_weights=self.token_weights)
        )

    def by_blocks(self, weights: Sequence[Weight], installed: Installed | None) -> Mapping[str, Curvature]:
        """The same statistics, by passes that continue where the previous ones ended (BlockwisePass)."""

        def compute() -> Mapping[str, Curvature]:
            # one example is enough for `_probe`; its passes over a full batch would be a large part of all calibration
            self.blockwise = self.blockwise or BlockwisePass(
                self.vlm, self.parts, self.data(self.rows), self.exposed, next(iter(self.data(1)))
            )
            with self.blockwise.run_up_to(weights, installed) as forward:
                data = self.blockwise.data
                counted = each(data, "calibrating", "batches", len(data))
                return collect(self.vlm, weights, counted, forward, self.token_weights)

        return self._halving_batches(compute)

    def _halving_batches(self, compute: Callable[[], Mapping[str, Curvature]]) -> Mapping[str, Curvature]:
        """Run `compute`, with half the batch size after each out-of-memory error."""
        while (statistics := run_or_halve(compute, self.rows, "the calibration data", self.vlm.device)) is None:
            self.rows //= 2
            self.blockwise = None  # its recorded outputs belong to the larger batches
        return statistics


def gather_exposed(vlm: VLM, parts: ComponentMap, data: Data, token_weights: TokenWeights | None = None) -> Gather:
    """A `Gather` of the model with the weights that it has at each call, block by block while a plan is installed."""
    passes = CalibrationBatches(vlm, parts, data, True, token_weights)
    return lambda weights, installed=None: passes.by_blocks(weights, installed)


def gather_float(
    vlm: VLM,
    parts: ComponentMap,
    data: Data,
    description: Mapping[str, object],
    cache: Cache | None,
    gram_bytes: int = GRAM_BYTES,
    token_weights: TokenWeights | None = None,
) -> Gather:
    """A `Gather` of the float model: all statistics in one pass, or a few blocks at a time if memory is short."""
    groups = _weight_groups(parts, gram_bytes)
    if cache is not None and sum(_gram_bytes(w) for group in groups for w in group) > cache.limit_gb * GB / 2:
        cache = None  # each pass over the blocks would delete what the next one asks for, and quantized weights with it
    group_of = {input_of(weight): i for i, group in enumerate(groups) for weight in group}
    in_memory: dict[int, Mapping[str, Curvature]] = {}
    passes = CalibrationBatches(vlm, parts, data, False, token_weights)
    # where the float weights are in memory, by which `compute` notices a quantized one
    addresses = {name: parameter.data_ptr() for name, parameter in vlm.model.named_parameters()}

    def compute(group: Sequence[Weight]) -> Mapping[str, Curvature]:
        assert all(p.data_ptr() == addresses[name] for name, p in vlm.model.named_parameters()), "not the float model"
        return passes.by_full_passes(group) if len(groups) == 1 else passes.by_blocks(group, ())

    def statistics_of(i: int) -> Mapping[str, Curvature]:
        if i not in in_memory:
            in_memory.clear()  # frees these matrices before the next are computed
            in_memory[i] = _stored(
                description, sorted(input_of(w) for w in groups[i]), lambda: compute(groups[i]), cache, vlm.device
            )
        return in_memory[i]

    def gather(weights: Sequence[Weight], installed: Installed | None = None) -> Mapping[str, Curvature]:
        # in the order of the groups, so that each group is computed once
        inputs = sorted({input_of(weight) for weight in weights}, key=lambda name: group_of[name])
        return {name: statistics_of(group_of[name])[name] for name in inputs}

    if len(groups) == 1 and vlm.device.type != "meta":  # a forecast has no weights, and asks for none
        statistics_of(0)  # now, since later the model may hold quantized weights
    return gather


def _weight_groups(parts: ComponentMap, gram_bytes: int) -> list[list[Weight]]:
    """One weight per distinct input, in the direction of data flow, in groups of as many blocks as fit `gram_bytes`."""
    groups: list[list[Weight]] = []
    bytes_left = 0
    seen: set[str] = set()
    for block in parts.regroup("block").components:
        group = [
            weight
            # reversed, so that the first weight that reads an input represents it
            for weight in {input_of(w): w for w in reversed(block.weights) if not w.is_embedding}.values()
            if input_of(weight) not in seen
        ]
        seen |= {input_of(weight) for weight in group}
        # a group has at least one block, even if that alone exceeds `gram_bytes`
        bytes_ = sum(map(_gram_bytes, group))
        if not groups or bytes_ > bytes_left:
            groups, bytes_left = [*groups, []], gram_bytes
        groups[-1] += group
        bytes_left -= bytes_
    return groups


def _gram_bytes(weight: Weight) -> int:
    """Bytes of the Gram matrix of a weight's input, in float32."""
    return 4 * weight.cols * weight.cols


def _stored(
    description: Mapping[str, object],
    inputs: list[str],
    compute: Callable[[], Mapping[str, Curvature]],
    cache: Cache | None,
    device: torch.device,
) -> Mapping[str, Curvature]:
    """Statistics of some inputs, from the cache on disk if it has them; its tensors are named `input|statistic`."""

    def make() -> dict[str, Tensor]:
        return {f"{name}|{key}": t for name, curvature in compute().items() for key, t in curvature.tensors().items()}

    tensors = make() if cache is None else cache.fetch({"statistics": {**description, "inputs": inputs}}, make, device)
    split: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        split.setdefault(name.rpartition("|")[0], {})[name.rpartition("|")[2]] = tensor
    return {name: Curvature.of(named) for name, named in split.items()}
