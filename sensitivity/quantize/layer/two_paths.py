"""Statistics of both calibration paths: how inputs after quantized layers differ from those in the float model."""

from __future__ import annotations

import torch
from torch import Tensor


class TwoPaths:
    """Sums over tokens whose input is x after quantized layers and x~ in the float model, each with its weight r.

    The layer reads x, and its output should be W x~. So the error to minimize is that of W x~ - Q x, which follows from
    `cross` and the Gram matrix up to a constant.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.cross = torch.zeros(width, width, device=device)  # sum r (x~ - x) x'
        self.image = torch.zeros(width, device=device)  # sum r x^2 over the tokens of the image

    def add(self, inputs: Tensor, unquantized: Tensor, importance: Tensor | None, image: Tensor | None) -> None:
        """Add tokens (tokens x width) of both paths; `image` is a mask of the image's tokens, None if all are."""
        values = inputs.float()
        scaled = values if importance is None else values * importance.to(values)[:, None]
        self.cross += (unquantized.float() - values).T @ scaled
        squares = scaled * values
        self.image += (squares if image is None else squares[image]).sum(0)
