"""calibrate(): statistics of each layer's inputs, from one pass over the data or block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sensitivity.measure.calibrate.absorbers import Absorber, absorbers
from sensitivity.measure.calibrate.blockwise import BlockwisePass, Done
from sensitivity.measure.calibrate.cache import Cache
from sensitivity.measure.calibrate.statistics import Gather, Statistics, known_path
from sensitivity.measure.calibrate.token_batches import PADDING, ROWS, TokenBatch, batches, disjoint, run
from sensitivity.measure.memory.out_of_memory import run_or_halve
from sensitivity.models.vlm import VLM
from sensitivity.quantize.curvature import Curvature
from sensitivity.quantize.linears import reads
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Setting
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.table import task as find_task

ROOM = 1 << 30  # bytes of Gram matrices in memory at once; one block of a 7B model has 0.7 GB


def calibrate(
    vlm: VLM,
    parts: ComponentMap,
    tasks: Sequence[str],
    n: int = 128,
    seed: int = 0,
    path: str = "float",
    against: Iterable[Task] = (),
    cache: Cache | None = None,
    room: int = ROOM,
) -> Statistics:
    """Statistics of the inputs of all layers in `parts`, on n calibration examples divided among the tasks.

    `against` lists the evaluation tasks, which must share no example and no image with the calibration data. Gram
    matrices that exceed `room` bytes together are computed a few blocks at a time, when they are asked for.
    """
    known_path(path)
    names = list(dict.fromkeys(tasks))
    if not names or n < len(names):
        raise UserError(f"{n} calibration examples are too few for {len(names)} tasks; each needs at least one")
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

    if path == "exposed":
        return Statistics(facts, exposed(vlm, parts, lambda rows: batches(vlm, data, rows)), trace, cache)
    about = {**facts, "model": vlm.fingerprint, "dtype": str(vlm.model.dtype)}
    found = unquantized(vlm, parts, lambda rows: batches(vlm, data, rows), about, cache, room)
    return Statistics(facts, found, trace, cache)


Data = Callable[[int], Iterable[TokenBatch]]  # calibration data in batches of at most so many rows


class CalibrationBatches:
    """Runs calibration data through a model, in batches that fit on the device.

    Statistics are sums over batches, so after an out-of-memory error they start from zero, with smaller batches.
    """

    def __init__(self, vlm: VLM, parts: ComponentMap, data: Data, exposed: bool) -> None:
        self.rows = ROWS
        self.vlm, self.parts, self.data, self.exposed = vlm, parts, data, exposed
        self.walk: BlockwisePass | None = None

    def whole(self, weights: Sequence[Weight]) -> Mapping[str, Curvature]:
        """Statistics of some weights' inputs, by full forward passes."""
        return self._fitting(lambda: collect(self.vlm, weights, self.data(self.rows)))

    def walked(self, weights: Sequence[Weight], done: Done | None) -> Mapping[str, Curvature]:
        """The same statistics, by passes that go on where the last ones ended (BlockwisePass)."""

        def study() -> Mapping[str, Curvature]:
            # one example is enough for `_look`, whose passes over a full batch would be a large part of all calibration
            self.walk = self.walk or BlockwisePass(
                self.vlm, self.parts, self.data(self.rows), self.exposed, next(iter(self.data(1)))
            )
            with self.walk.towards(weights, done) as forward:
                return collect(self.vlm, weights, self.walk.data, forward)

        return self._fitting(study)

    def _fitting(self, study: Callable[[], Mapping[str, Curvature]]) -> Mapping[str, Curvature]:
        """Run `study`, with half the batch size after each out-of-memory error."""
        while (found := run_or_halve(study, self.rows, "the calibration data", self.vlm.device)) is None:
            self.rows //= 2
            self.walk = None  # its recorded outputs belong to the larger batches
        return found


def exposed(vlm: VLM, parts: ComponentMap, data: Data) -> Gather:
    """Statistics of the model as it is when they are asked for, block by block while a plan is put in."""
    portions = CalibrationBatches(vlm, parts, data, exposed=True)
    return lambda weights, done=None: portions.walked(weights, done)


def unquantized(
    vlm: VLM,
    parts: ComponentMap,
    data: Data,
    about: Mapping[str, Any],
    cache: Cache | None,
    room: int = ROOM,
) -> Gather:
    """Statistics of the float model: of all layers in one pass, or of a few blocks at a time if memory is short."""
    shares = _shares(parts, room)
    at = {reads(weight): i for i, share in enumerate(shares) for weight in share}
    held: dict[int, Mapping[str, Curvature]] = {}
    portions = CalibrationBatches(vlm, parts, data, exposed=False)
    # addresses of the float weights, by which `study` notices a quantized one
    own = {name: parameter.data_ptr() for name, parameter in vlm.model.named_parameters()}

    def study(share: Sequence[Weight]) -> Mapping[str, Curvature]:
        assert all(p.data_ptr() == own[name] for name, p in vlm.model.named_parameters()), "not the float model"
        return portions.whole(share) if len(shares) == 1 else portions.walked(share, ())

    def find(i: int) -> Mapping[str, Curvature]:
        if i not in held:
            held.clear()  # frees these matrices before the next are computed
            held[i] = _stored(about, sorted(reads(w) for w in shares[i]), lambda: study(shares[i]), cache, vlm.device)
        return held[i]

    def gather(weights: Sequence[Weight], done: Done | None = None) -> Mapping[str, Curvature]:
        # in the order of the shares, so that each share is computed once
        wanted = sorted({reads(weight) for weight in weights}, key=lambda name: at[name])
        return {name: find(at[name])[name] for name in wanted}

    if len(shares) == 1 and vlm.device.type != "meta":  # a forecast has no weights, and asks for none
        find(0)  # now, since later the model may hold quantized weights
    return gather


def _shares(parts: ComponentMap, room: int) -> list[list[Weight]]:
    """One weight per distinct input, in the direction of data flow, in shares of as many blocks as fit in `room`."""
    shares: list[list[Weight]] = []
    left = 0
    seen: set[str] = set()
    for block in parts.regroup("block").components:
        share = [
            weight
            # reversed, so that the first weight that reads an input represents it
            for weight in {reads(w): w for w in reversed(block.weights) if not w.looked_up}.values()
            if reads(weight) not in seen
        ]
        seen |= {reads(weight) for weight in share}
        # a Gram matrix is float32; a share has at least one block, even if that alone exceeds the room
        bytes_ = sum(4 * weight.cols * weight.cols for weight in share)
        if not shares or bytes_ > left:
            shares, left = [*shares, []], room
        shares[-1] += share
        left -= bytes_
    return shares


def _stored(
    about: Mapping[str, Any],
    inputs: list[str],
    study: Callable[[], Mapping[str, Curvature]],
    cache: Cache | None,
    device: torch.device,
) -> Mapping[str, Curvature]:
    """Statistics of some inputs, through the cache on disk, where a tensor's name is `input|statistic`."""

    def make() -> dict[str, Tensor]:
        return {f"{name}|{key}": t for name, found in study().items() for key, t in found.tensors().items()}

    tensors = make() if cache is None else cache.fetch({"statistics": {**about, "inputs": inputs}}, make, device)
    split: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        split.setdefault(name.rpartition("|")[0], {})[name.rpartition("|")[2]] = tensor
    return {name: Curvature.of(of_one) for name, of_one in split.items()}


def collect(
    vlm: VLM, weights: Iterable[Weight], data: Iterable[TokenBatch], forward: Callable[[VLM, TokenBatch], None] = run
) -> dict[str, Curvature]:
    """Statistics of the inputs of some weights on the model as it is, summed over the batches."""
    leaders = {reads(weight): weight for weight in weights}
    found = {name: Curvature(w.cols, vlm.device) for name, w in leaders.items()}
    # the batch of the current forward pass, for the hooks
    now: list[TokenBatch] = []

    def watch(name: str, part: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            modality, counts = now[0].modality(part, x.shape[:-1])
            # padding tokens are left out of the sums: no answer depends on them
            flat = x.reshape(-1, x.shape[-1])
            found[name].add(flat if modality is None or not counts[PADDING] else flat[modality != PADDING])
            found[name].modalities += counts

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for name, weight in leaders.items():
            module = vlm.model.get_submodule(weight.reader)
            handle = module.register_forward_pre_hook(watch(name, weight.part), with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in data:
            now[:] = [batch]
            forward(vlm, batch)
    for name, weight in leaders.items():
        found[name].check(weight.name)
    return found
