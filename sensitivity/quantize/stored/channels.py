"""Weights whose rows each have their own width, from 0 bits (the row is zero) to 16 (the row is not quantized)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChannelWidthsWeight:
    """Symmetric codes and a scale for each row at its own width; rows of 16 bits are kept as floats."""

    codes: Tensor  # uint8, rows x columns
    scale: Tensor  # rows x 1, with values that 16 bits hold; 0 for rows of 0 bits
    widths: Tensor  # int16, bits of each row
    kept: Tensor  # the rows of 16 bits, in order

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        zero = torch.where(self.widths > 0, 2.0 ** (self.widths.float() - 1), 0.0)
        weight = (self.codes.float() - zero[:, None]) * self.scale
        weight[self.widths == 16] = self.kept
        return weight
