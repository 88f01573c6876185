"""Cache of quantized weights: codes up to a memory limit, dequantized only for the latest plan."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sensitivity.measure.memory.out_of_memory import room_beside
from sensitivity.quantize.stored.channels import ChannelWidthsWeight
from sensitivity.quantize.stored.codebook import CodebookWeight
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.quantize.stored.levels import BinaryWeight, BinnedWeight, LevelsWeight, PlanesWeight
from sensitivity.quantize.stored.low_rank import LowRankWeight
from sensitivity.quantize.stored.rotated import RotatedWeight
from sensitivity.quantize.stored.sparse import SparseWeight, TwoScaleWeight
from sensitivity.quantize.stored.weight import StoredWeight
from sensitivity.spec.plan import Scheme

# a parameter's name, its scheme, and on the exposed path what was quantized before it
Key = tuple[str, Scheme] | tuple[str, Scheme, tuple[tuple[str, Scheme], ...]]
HOST = torch.device("cpu")
BYTES_PER_CODE = 1.25  # bytes per cached weight, including scales of small groups
Coded = (
    QuantizedWeight
    | CodebookWeight
    | LevelsWeight
    | PlanesWeight
    | BinaryWeight
    | BinnedWeight
    | SparseWeight
    | TwoScaleWeight
    | RotatedWeight
    | ChannelWidthsWeight
    | LowRankWeight
)
KINDS: tuple[type[Coded], ...] = get_args(Coded)
# A plain tensor is cached where there are no codes: for biases, and for weights that a method leaves alone.
CachedWeight = Tensor | Coded
# by type of a field that is not a tensor: the function that reads it back from the tensor that stores it
FROM_TENSOR: dict[str, Callable[[Tensor], object]] = {
    "int": int,
    "int | None": int,
    "torch.Size": lambda sizes: torch.Size(sizes.tolist()),
}


class WeightCodes(OrderedDict[Key, CachedWeight]):
    """Quantized weights, on the model's GPU as far as there is room, else in host memory.

    `trim` drops the least recently used, between two plans.
    """

    def __init__(self, limit: float = math.inf, beside: nn.Module | None = None, one_in: int = 4) -> None:
        """`limit` is in bytes of host memory; without a model `beside` them, all codes lie there.

        one_in: codes take at most one part in so many of what is free on the model's GPU.
        """
        super().__init__()
        self.limit = limit
        self.bytes = self.bytes_there = 0  # of all codes, and of those on the GPU
        self.device, self.room = HOST, 0  # where codes lie, and how many bytes of them: the rest is in host memory
        first = None if beside is None else next(beside.parameters(), None)
        if beside is not None and first is not None and first.is_cuda:
            self.device, self.room = first.device, room_beside(first.device, parameter_bytes(beside), one_in)
        self.run_time: dict[Hashable, object] = {}  # ranges and scales for rounding activations (see RunTimeRounding)
        self.norms: dict[Hashable, dict[str, Tensor]] = {}  # tweaked norms of blocks, by name (see TweakedNorms)
        self.cache_magnitudes: dict[str, Tensor] = {}  # by layer: the largest of each channel of keys and values
        # per parameter, the weight that the last plan put into the model, and its key: neighboring plans share most
        self._dense: dict[str, tuple[Key, Tensor]] = {}

    def __getitem__(self, key: Key) -> CachedWeight:
        self.move_to_end(key)  # marks the entry as recently used
        return super().__getitem__(key)

    def __setitem__(self, key: Key, value: CachedWeight) -> None:
        if key in self:
            self._count(self[key], -1)
        has_room = self.bytes_there + _bytes(value) <= self.room
        super().__setitem__(key, _to_device(value, self.device if has_room else HOST))
        self._count(self[key], 1)

    @property
    def bytes_on_host(self) -> int:
        """The bytes of codes that lie in host memory."""
        return self.bytes - self.bytes_there

    def _count(self, value: CachedWeight, sign: int) -> None:
        """Add the bytes of an entry, or take them off again."""
        self.bytes += sign * _bytes(value)
        self.bytes_there += sign * _bytes(value) if _is_on_gpu(value) else 0

    def dense(self, key: Key, like: Tensor) -> Tensor:
        """The weight dequantized to the device and dtype of `like`; each parameter's latest result is kept."""
        name = key[0]
        if name not in self._dense or self._dense[name][0] != key:
            self._dense.pop(name, None)  # freed before the next one is allocated
            self._dense[name] = key, self.dequantized(key, like)
        return self._dense[name][1]

    def dequantized(self, key: Key, like: Tensor) -> Tensor:
        """The weight dequantized to the device and dtype of `like`, and not kept."""
        value = _to_device(self[key], like.device)
        return (value if isinstance(value, Tensor) else value.dequantize()).to(like.dtype)

    def trim_dense(self) -> None:
        """Keep dense weights as far as the limit has room beside the codes.

        Those that have stayed longest are kept: the next plan most likely shares them. On a GPU all are kept: the
        next plan takes as much memory for its own, and nothing else does before it.
        """
        total = self.bytes_on_host
        for name, (_, tensor) in list(self._dense.items()):
            if tensor.is_cuda and self.limit:
                continue
            total += tensor.numel() * tensor.element_size()
            if total > self.limit:
                del self._dense[name]

    def trim(self) -> None:
        """Drop the least recently used entries of host memory until the rest is within the limit."""
        if self.bytes_on_host <= self.limit:
            return
        for key in list(self):
            value = super().__getitem__(key)
            if not _is_on_gpu(value):
                self._count(value, -1)
                del self[key]
            if self.bytes_on_host <= self.limit:
                return

    def release(self) -> bool:
        """Move all codes into host memory for good, because the GPU's is needed; false if none lay there."""
        freed, self.room = self.bytes_there > 0, 0
        for key in list(self) if freed else ():
            super().__setitem__(key, _to_device(super().__getitem__(key), HOST))
        self.bytes_there = 0
        return freed


def as_cached(value: StoredWeight) -> CachedWeight:
    """A method's result as it is cached: codes of a known type, otherwise the dequantized weight."""
    return value if isinstance(value, KINDS) else value.dequantize()


def tensors(value: CachedWeight) -> dict[str, Tensor]:
    """A cached value as named tensors; integers become tensors, too, so that a safetensors file holds all of it."""
    if isinstance(value, Tensor):
        return {"weight": value}
    named: dict[str, Tensor] = {}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if isinstance(part, KINDS):  # a stored weight inside another one, such as that beside outliers
            named |= {f"{field.name}.{name}": tensor for name, tensor in tensors(part).items()}
        elif part is not None:
            named[field.name] = part if isinstance(part, Tensor) else torch.tensor(part)
    return named


def from_tensors(named: Mapping[str, Tensor]) -> CachedWeight:
    """The inverse of `tensors`."""
    if "weight" in named:
        return named["weight"]
    names = {name.partition(".")[0] for name in named}
    # the kinds differ in their fields, of which some may be None and are then missing here
    (kind,) = (kind for kind in KINDS if _required(kind) <= names <= {field.name for field in dataclasses.fields(kind)})
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        inner = {k.partition(".")[2]: tensor for k, tensor in named.items() if k.startswith(f"{field.name}.")}
        if inner:
            parts[field.name] = from_tensors(inner)
        elif (tensor := named.get(field.name)) is not None:
            parts[field.name] = FROM_TENSOR[str(field.type)](tensor) if str(field.type) in FROM_TENSOR else tensor
        else:
            parts[field.name] = None
    return kind(**parts)


def _required(kind: type[Any]) -> set[str]:
    """The fields of a kind that are never None."""
    return {field.name for field in dataclasses.fields(kind) if "None" not in str(field.type)}


def parameter_bytes(model: nn.Module) -> int:
    """The bytes of all parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _to_device(value: CachedWeight, device: torch.device) -> CachedWeight:
    """A cached value on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    moved: dict[str, Any] = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    for name, part in moved.items():
        if isinstance(part, CachedWeight):
            moved[name] = _to_device(part, device)
    return type(value)(**moved)


def _is_on_gpu(value: CachedWeight) -> bool:
    return any(tensor.is_cuda for tensor in tensors(value).values())


def _bytes(value: CachedWeight) -> int:
    """The bytes of all tensors of a cached value."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(value).values())
