"""Finds the ranges of queries, keys and values, and the signs that fold the two peaks of keys into one (PTQ4SAM)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sensitivity.quantize.run_time.settings import FOLDED
from sensitivity.spec.components import KEY_VALUE, Weight
from sensitivity.spec.errors import UserError

QUERIES, KEYS, ALL = ("q_proj", "q", "query"), ("k_proj", "k", "key"), "qkv"
# as in PTQ4SAM's code: points of the density, the least distance of its peaks in points, and their least height as a
# share of its sum
POINTS, MIN_DISTANCE, MIN_HEIGHT = 128, 32, 0.01
SAMPLE = 4096  # values of the first batch from which the density is estimated


@dataclass(frozen=True)
class OperandGrid:
    """How a layer's outputs are rounded: the signs by which they are multiplied first, and the range of each channel.

    All channels of an operand (queries, keys or values) have the same range, so that it has one scale.
    """

    signs: Tensor
    low: Tensor
    high: Tensor


def is_operand(weight: Weight) -> bool:
    """Whether a layer gives queries, keys or values of attention."""
    leaf = weight.module.rpartition(".")[2]
    named = leaf in (*QUERIES, *KEY_VALUE) or ALL in leaf
    return named and weight.kind in ("attn", "cross") and weight.block is not None


def operand_grids(
    model: nn.Module, weights: Sequence[Weight], mode: str, passes: Callable[[], Iterable[object]]
) -> dict[str, OperandGrid]:
    """By weight: the range of its outputs over all passes, and if folded the signs of keys that have two peaks."""
    seen = {weight.name: _Outputs() for weight in weights}
    with ExitStack() as hooks:
        for weight in weights:
            handle = model.get_submodule(weight.module).register_forward_hook(seen[weight.name].hook)
            hooks.callback(handle.remove)
        for _ in passes():
            pass
    return {weight.name: _grid(weight, seen[weight.name], mode == FOLDED) for weight in weights}


def signs_of(mean: Tensor, sample: Tensor) -> Tensor:
    """The sign of each channel's mean where the channels together have two peaks, else +1.

    Queries times the same signs leave every product of the two as it is. A mean of zero counts as positive, since a
    sign of zero would delete the channel.
    """
    return torch.where((mean < 0) & two_peaks(sample), -1.0, 1.0).to(mean)


def two_peaks(sample: Tensor) -> bool:
    """Whether the density of some numbers has two peaks that are far apart and high enough."""
    from scipy.signal import find_peaks  # these two imports take a second, which every sweep would wait for
    from scipy.stats import gaussian_kde

    values = sample.double().cpu().numpy()
    if np.ptp(values) == 0:
        return False
    density = gaussian_kde(values)(np.linspace(values.min(), values.max(), POINTS))
    peaks, _ = find_peaks(density, height=MIN_HEIGHT * density.sum(), distance=MIN_DISTANCE)
    return len(peaks) == 2


class _Outputs:
    """The range and the mean of each channel of a layer's outputs, and all outputs of the first batch."""

    def __init__(self) -> None:
        self.low = self.high = self.sum = torch.zeros(())
        self.count = 0
        self.first: Tensor | None = None

    def hook(self, module: nn.Module, args: object, output: Tensor) -> None:
        values = output.detach().float().flatten(0, -2)
        low, high = torch.aminmax(values, dim=0)
        self.low, self.high = torch.minimum(self.low.to(low), low), torch.maximum(self.high.to(high), high)
        self.sum, self.count = self.sum.to(values) + values.sum(0), self.count + len(values)
        self.first = values if self.first is None else self.first


def _grid(weight: Weight, seen: _Outputs, folded: bool) -> OperandGrid:
    """One range for each operand in a layer; a fused layer has three."""
    if seen.first is None:
        raise UserError(f"{weight.name} received no token of the calibration data, so its outputs have no range")
    leaf = weight.module.rpartition(".")[2]
    fused = ALL in leaf
    if fused and weight.rows != 3 * weight.cols:
        raise UserError(
            f"{weight.name} has queries, keys and values of unequal sizes in one layer, which cannot be told apart; "
            "leave out --set attention"
        )
    pieces = torch.arange(weight.rows).chunk(3 if fused else 1)
    signs = torch.ones_like(seen.low)
    keys = pieces[1] if fused else pieces[0] if leaf in KEYS else None
    if folded and keys is not None:
        own = seen.first[:, keys].flatten()
        # at random, since an even stride could meet the same channels again and again
        drawn = torch.randperm(len(own), generator=torch.Generator().manual_seed(0))[:SAMPLE]
        signs[keys] = signs_of(seen.sum[keys] / seen.count, own[drawn.to(own.device)])
    low = torch.where(signs > 0, seen.low, -seen.high)
    high = torch.where(signs > 0, seen.high, -seen.low)
    for piece in pieces:
        low[piece], high[piece] = low[piece].min().clamp(max=0), high[piece].max().clamp(min=0)
    return OperandGrid(signs, low, high)
