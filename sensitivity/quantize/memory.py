"""Quantised weights in memory, as many as a budget allows: those that were not used for longest go first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor


class Bounded(OrderedDict[tuple[Any, ...], Tensor]):
    """A Memory for `quantized` that is cut down to its budget between two plans, when no weight of it is in a model."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __getitem__(self, key: tuple[Any, ...]) -> Tensor:
        self.move_to_end(key)
        return super().__getitem__(key)

    @property
    def bytes(self) -> int:
        return sum(weight.numel() * weight.element_size() for weight in self.values())

    def trim(self) -> None:
        used = self.bytes
        while used > self.limit:
            _, weight = self.popitem(last=False)
            used -= weight.numel() * weight.element_size()
