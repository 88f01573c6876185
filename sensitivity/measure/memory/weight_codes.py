"""Quantized weights in memory: as codes, as many as a budget allows, and as numbers only those last in the model."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sensitivity.quantize.codebook import CodebookWeight
from sensitivity.quantize.grid import QuantizedWeight
from sensitivity.quantize.linears import StoredWeight

Key = tuple[Any, ...]  # a parameter's name, its scheme, and on the exposed path what was quantized before it
CODE = 1.25  # bytes of a weight, scales of small groups included
Held = (
    Tensor | QuantizedWeight | CodebookWeight
)  # what has no codes is a tensor: biases, weights that a method leaves alone


class WeightCodes(OrderedDict[Key, Held]):
    """Those that were not used for longest go first, between two plans. Codes lie in the host's memory."""

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.limit = limit
        self.bytes = 0
        self._dense: dict[str, tuple[Key, Tensor]] = {}

    def __getitem__(self, key: Key) -> Held:
        self.move_to_end(key)
        return super().__getitem__(key)

    def __setitem__(self, key: Key, value: Held) -> None:
        self.bytes -= _bytes(self[key]) if key in self else 0
        super().__setitem__(key, _moved(value, torch.device("cpu")))
        self.bytes += _bytes(self[key])

    def dense(self, key: Key, like: Tensor) -> Tensor:
        """The weight as numbers, on the device and of the type of the model's own; the last one is kept."""
        name = key[0]
        if name not in self._dense or self._dense[name][0] != key:
            self._dense.pop(name, None)
            value = _moved(self[key], like.device)
            self._dense[name] = key, (value if isinstance(value, Tensor) else value.dequantize()).to(like.dtype)
        return self._dense[name][1]

    def trim(self) -> None:
        while self.bytes > self.limit:
            _, value = self.popitem(last=False)
            self.bytes -= _bytes(value)


def held(value: StoredWeight) -> Held:
    """A method's result, if it is of a kind that is known here; numbers otherwise."""
    return value if isinstance(value, QuantizedWeight | CodebookWeight) else value.dequantize()


def tensors(value: Held) -> dict[str, Tensor]:
    """What a value consists of, by name; whole numbers too, so that a file of tensors holds all of it."""
    if isinstance(value, Tensor):
        return {"weight": value}
    fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    return {name: v if isinstance(v, Tensor) else torch.tensor(v) for name, v in fields if v is not None}


def value_of(found: Mapping[str, Tensor]) -> Held:
    """The other way round."""
    if "weight" in found:
        return found["weight"]
    if "table" in found:
        return CodebookWeight(found["codes"], found["table"], found["scale"], torch.Size(found["shape"].tolist()))
    return QuantizedWeight(found["codes"], found["scale"], found["zero"], int(found["group"]), found.get("inputs"))


def _moved(value: Held, device: torch.device) -> Held:
    if isinstance(value, Tensor):
        return value.to(device)
    return value_of({name: v.to(device) for name, v in tensors(value).items()})


def _bytes(value: Held) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(value).values())
