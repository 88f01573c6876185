"""Cache of quantized weights: codes up to a memory limit, dequantized only for the latest plan."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

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
    """Quantized weights in host memory; `trim` drops the least recently used, between two plans."""

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.limit = limit
        self.bytes = 0
        self.run_time: dict[Hashable, object] = {}  # ranges and scales for rounding activations (see RunTimeRounding)
        self.norms: dict[Hashable, dict[str, Tensor]] = {}  # tweaked norms of blocks, by name (see TweakedNorms)
        self.cache_magnitudes: dict[str, Tensor] = {}  # by layer: the largest of each channel of keys and values
        # per parameter, the weight that the last plan put into the model, and its key: neighboring plans share most
        self._dense: dict[str, tuple[Key, Tensor]] = {}

    def __getitem__(self, key: Key) -> CachedWeight:
        self.move_to_end(key)  # marks the entry as recently used
        return super().__getitem__(key)

    def __setitem__(self, key: Key, value: CachedWeight) -> None:
        self.bytes -= _bytes(self[key]) if key in self else 0
        super().__setitem__(key, _to_device(value, torch.device("cpu")))
        self.bytes += _bytes(self[key])

    def dense(self, key: Key, like: Tensor) -> Tensor:
        """The weight dequantized to the device and dtype of `like`; each parameter's latest result is kept."""
        name = key[0]
        if name not in self._dense or self._dense[name][0] != key:
            self._dense.pop(name, None)  # freed before the next one is allocated
            value = _to_device(self[key], like.device)
            self._dense[name] = key, (value if isinstance(value, Tensor) else value.dequantize()).to(like.dtype)
        return self._dense[name][1]

    def trim_dense(self) -> None:
        """Keep dense weights as far as the limit has room beside the codes.

        Those that have stayed longest are kept: the next plan most likely shares them.
        """
        total = self.bytes
        for name, (_, tensor) in list(self._dense.items()):
            total += tensor.numel() * tensor.element_size()
            if total > self.limit:
                del self._dense[name]

    def trim(self) -> None:
        """Drop the least recently used entries until the rest is within the limit."""
        while self.bytes > self.limit:
            _, value = self.popitem(last=False)
            self.bytes -= _bytes(value)


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


def _to_device(value: CachedWeight, device: torch.device) -> CachedWeight:
    """A cached value on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return from_tensors({name: v.to(device) for name, v in tensors(value).items()})


def _bytes(value: CachedWeight) -> int:
    """The bytes of all tensors of a cached value."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(value).values())
