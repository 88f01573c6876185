"""Weights of low rank: a product of two quantized matrices, with a latent vector between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sensitivity.quantize.stored.integer_grid import QuantizedWeight


@dataclass(frozen=True)
class LowRankWeight:
    """Weights that read one input share `down`, so that their outputs are computed from one latent vector."""

    up: QuantizedWeight  # rows x rank
    down: QuantizedWeight  # rank x columns

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        return self.up.dequantize() @ self.down.dequantize()
