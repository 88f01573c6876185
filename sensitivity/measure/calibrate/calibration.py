"""calibrate(): statistics of all layers from one pass of the calibration data, or of each block as a plan goes in."""

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

ROOM = 1 << 30  # bytes of Gram matrices at once; a block of a 7B model has 0.7 GB of them


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
    """What the layers of `parts` see on n examples of the tasks' calibration splits, shared out among the tasks.

    `against` are the tasks that will be evaluated on, which must have no example and no image in common with these.
    Matrices that do not fit into `room` bytes together are found a few blocks at a time, when they are asked for.
    """
    known_path(path)
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

    if path == "exposed":
        return Statistics(facts, exposed(vlm, parts, lambda rows: batches(vlm, data, rows)), trace, cache)
    about = {**facts, "model": vlm.fingerprint, "dtype": str(vlm.model.dtype)}
    found = unquantized(vlm, parts, lambda rows: batches(vlm, data, rows), about, cache, room)
    return Statistics(facts, found, trace, cache)


Data = Callable[[int], Iterable[TokenBatch]]  # the calibration data in batches of at most so many rows


class CalibrationBatches:
    """Calibration data on its way through a model, in batches that fit onto the device.

    Statistics are sums over batches, so a study that ran out of memory begins anew, with smaller ones.
    """

    def __init__(self, vlm: VLM, parts: ComponentMap, data: Data, exposed: bool) -> None:
        self.rows = ROWS
        self.vlm, self.parts, self.data, self.exposed = vlm, parts, data, exposed
        self.walk: BlockwisePass | None = None

    def whole(self, weights: Sequence[Weight]) -> Mapping[str, Curvature]:
        """What some weights see, by whole forward passes."""
        return self._fitting(lambda: collect(self.vlm, weights, self.data(self.rows)))

    def walked(self, weights: Sequence[Weight], done: Done | None) -> Mapping[str, Curvature]:
        """The same, from where the last study left off."""

        def study() -> Mapping[str, Curvature]:
            # one example is enough to look at: a pass over a whole batch is a good part of all calibration
            self.walk = self.walk or BlockwisePass(
                self.vlm, self.parts, self.data(self.rows), self.exposed, next(iter(self.data(1)))
            )
            with self.walk.towards(weights, done) as forward:
                return collect(self.vlm, weights, self.walk.data, forward)

        return self._fitting(study)

    def _fitting(self, study: Callable[[], Mapping[str, Curvature]]) -> Mapping[str, Curvature]:
        while (found := run_or_halve(study, self.rows, "the calibration data", self.vlm.device)) is None:
            self.rows //= 2
            self.walk = None
        return found


def exposed(vlm: VLM, parts: ComponentMap, data: Data) -> Gather:
    """Statistics of the model as it stands when they are asked for, block after block of a plan."""
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
    """Statistics of the float model: of all layers at once in one pass, or of a few blocks where there is less room."""
    shares = _shares(parts, room)
    at = {reads(weight): i for i, share in enumerate(shares) for weight in share}
    held: dict[int, Mapping[str, Curvature]] = {}
    portions = CalibrationBatches(vlm, parts, data, exposed=False)
    own = {name: parameter.data_ptr() for name, parameter in vlm.model.named_parameters()}

    def study(share: Sequence[Weight]) -> Mapping[str, Curvature]:
        assert all(p.data_ptr() == own[name] for name, p in vlm.model.named_parameters()), "not the float model"
        return portions.whole(share) if len(shares) == 1 else portions.walked(share, ())

    def find(i: int) -> Mapping[str, Curvature]:
        if i not in held:
            held.clear()  # before the next ones are made
            held[i] = _stored(about, sorted(reads(w) for w in shares[i]), lambda: study(shares[i]), cache, vlm.device)
        return held[i]

    def gather(weights: Sequence[Weight], done: Done | None = None) -> Mapping[str, Curvature]:
        wanted = sorted({reads(weight) for weight in weights}, key=lambda name: at[name])
        return {name: find(at[name])[name] for name in wanted}

    if len(shares) == 1 and vlm.device.type != "meta":  # a forecast has no weights, and asks for none
        find(0)  # at once: later the model may hold other weights
    return gather


def _shares(parts: ComponentMap, room: int) -> list[list[Weight]]:
    """One weight for each input, in the direction of data flow, as many blocks together as fit; never less than one."""
    shares: list[list[Weight]] = []
    left = 0
    seen: set[str] = set()
    for block in parts.regroup("block").components:
        share = [
            weight
            for weight in {reads(w): w for w in reversed(block.weights) if not w.looked_up}.values()
            if reads(weight) not in seen
        ]
        seen |= {reads(weight) for weight in share}
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
    """Statistics of some inputs, through the cache on disk."""

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
    """What the inputs of some weights look like on the model as it stands, batch by batch."""
    leaders = {reads(weight): weight for weight in weights}
    found = {name: Curvature(w.cols, vlm.device) for name, w in leaders.items()}
    now: list[TokenBatch] = []

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
            module = vlm.model.get_submodule(weight.reader)
            handle = module.register_forward_pre_hook(watch(name, weight.part), with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in data:
            now[:] = [batch]
            forward(vlm, batch)
    for name, weight in leaders.items():
        found[name].check(weight.name)
    return found
