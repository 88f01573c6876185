"""Weights whose levels are not an integer grid: codebooks, bit planes, binary weights and bins of magnitudes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sensitivity.quantize.stored.integer_grid import over_columns


@dataclass(frozen=True)
class LevelsWeight:
    """A weight whose codes are indices into the codebook of their row."""

    codes: Tensor  # uint8, rows x columns
    levels: Tensor  # rows x 2^bits, rising, with values that 16 bits hold

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        return self.levels.gather(1, self.codes.long())


@dataclass(frozen=True)
class PlanesWeight:
    """A weight that is a sum over bit planes, c_0 + sum_k c_k b_k, with coefficients per row and group of columns."""

    codes: Tensor  # uint8, rows x columns; its bit k is b_(k+1)
    coefficients: Tensor  # rows x groups x (planes + 1), with values that 16 bits hold; c_0 comes first
    group: int

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        weight, *planes = (over_columns(c, self.group, self.codes.shape[1]) for c in self.coefficients.unbind(2))
        for k, slope in enumerate(planes):
            weight = weight.addcmul(slope, bit(self.codes, k))
        return weight


@dataclass(frozen=True)
class BinaryWeight:
    """BiLLM's weight: salient columns have two signs, the other weights one sign and the half that they belong to.

    Bit 0 of a code is the sign. Bit 1 is the second sign in a salient column, and elsewhere the half, if there are two.
    """

    codes: Tensor  # uint8, rows x columns
    halves: Tensor  # rows x groups x (1 or 2) x 2: mean and magnitude of each half
    salient: Tensor | None  # rows x groups x 3: mean and the two magnitudes of salient columns
    columns: Tensor | None  # bool per column: whether it is salient
    group: int

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        width, first, second = self.codes.shape[1], signs(self.codes, 0), signs(self.codes, 1)
        halves = []
        for part in self.halves.unbind(2):
            mean, magnitude = (over_columns(t, self.group, width) for t in part.unbind(2))
            halves.append(mean.addcmul(magnitude, first))
        weight = halves[0] if len(halves) == 1 else torch.where(second > 0, halves[1], halves[0])
        if self.salient is None or self.columns is None:
            return weight
        mean, larger, smaller = (over_columns(t, self.group, width) for t in self.salient.unbind(2))
        return torch.where(self.columns, mean.addcmul(larger, first).addcmul(smaller, second), weight)


@dataclass(frozen=True)
class BinnedWeight:
    """Bi-VLM's weight: a sign and a bin of magnitudes, which the whole matrix shares, or a salient level of its row.

    A code is twice the bin plus the sign; the two salient bins come last.
    """

    codes: Tensor  # uint8, rows x columns
    magnitudes: Tensor  # one per bin, for the whole matrix
    center: Tensor | None  # mean and standard deviation of salient weights, in units of their row's scale
    scale: Tensor | None  # one per row, of its salient weights

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        table = torch.stack([-self.magnitudes, self.magnitudes], 1).reshape(-1)
        if self.center is None or self.scale is None:
            return table[self.codes.long()]
        weight = torch.cat([table, salient_levels(self.center)])[self.codes.long()]
        return torch.where(self.codes >= len(table), weight * self.scale[:, None], weight)


# Bi-VLM: levels are the midpoints of neighboring bounds mu + sigma sign(d) (1.4 e^|d| - 1), d in {-1, -.5, 0, .5, 1}
NEAR, FAR = 0.654, 2.057


def salient_levels(center: Tensor) -> Tensor:
    """The four levels of salient weights in order of their codes: below and above the mean, first near, then far."""
    mean, deviation = center
    return torch.stack(
        [mean - NEAR * deviation, mean + NEAR * deviation, mean - FAR * deviation, mean + FAR * deviation]
    )


def bit(codes: Tensor, place: int) -> Tensor:
    """One bit of each code, as 0 or 1 in float32."""
    return ((codes >> place) & 1).float()


def signs(codes: Tensor, place: int) -> Tensor:
    """One bit of each code, as -1 or 1 in float32."""
    return bit(codes, place) * 2 - 1
