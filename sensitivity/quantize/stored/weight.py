"""StoredWeight: the interface of every quantized weight."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class StoredWeight(Protocol):
    """A weight as it is stored; `dequantize` gives its numbers."""

    def dequantize(self) -> Tensor: ...
