"""Bi-VLM: a sign and a magnitude bin per element, bins by Gaussian quantiles per matrix; a row scale for the tail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.special import ndtri
from torch import Tensor

from sensitivity.quantize.stored.integer_grid import as_16_bit
from sensitivity.quantize.stored.levels import BinnedWeight, salient_levels
from sensitivity.spec.plan import Scheme

ITERATIONS = 10  # alternating updates of the salient row scale and the clipped weights; the paper gives no number
MIN_SHARE = 1e-6  # share of salient weights below which there are none


def quantize_bivlm(weight: Tensor, scheme: Scheme) -> BinnedWeight:
    """Binary weights with one magnitude per Gaussian-quantile bin of the whole matrix, without error feedback.

    Read in full in the paper: bins of equal probability under the matrix's own mean and deviation, |w| against
    mu + sigma z; one scalar per bin, the mean of |w|; the tail in two bits with a scale per row; the tail's share by
    Brent's search of the least squared error, up to `salient` (1 % in the language model, 5 % in the vision tower).
    The paper claims 1 to 1.1 bits and leaves out the index of the bin; we count it, at a fixed width. How many bins its
    tables use is not stated; 5 and 6 are mentioned.
    """
    from scipy.optimize import minimize_scalar  # takes half a second, which every method would wait for

    values = weight.float()
    matrix = Magnitudes.of(values)
    bins, most = int(scheme["bins"] or 1), float(scheme["salient"] or 0)
    share = most and float(
        minimize_scalar(
            lambda p: matrix.error(p, bins, weight.dtype),
            bounds=(0, most),
            method="bounded",
            options={"xatol": most / 50},
        ).x
    )
    bounds = matrix.bounds(share, bins)
    place = torch.bucketize(values.abs(), bounds)  # bin k holds bounds[k - 1] < |w| <= bounds[k]
    magnitudes = as_16_bit(matrix.means(bounds), weight.dtype)
    codes = 2 * place.clamp(max=bins - 1) + (values >= 0)
    if not most:
        return BinnedWeight(codes.to(torch.uint8), magnitudes, None, None)
    tail = place == bins if share > MIN_SHARE else torch.zeros_like(place, dtype=torch.bool)
    scale, center, tail_codes = salient(values[tail], tail.nonzero()[:, 0], len(values), weight.dtype)
    codes[tail] = 2 * bins + tail_codes
    return BinnedWeight(codes.to(torch.uint8), magnitudes, center, scale)


@dataclass(frozen=True)
class Magnitudes:
    """The magnitudes of a matrix in rising order, and their running sums, which give the error of any bin at once."""

    weight: Tensor
    rising: Tensor
    first: Tensor  # sums of the magnitudes before each place
    second: Tensor  # sums of their squares
    mean: float
    deviation: float

    @classmethod
    def of(cls, weight: Tensor) -> Magnitudes:
        """Sort a matrix once, for all bounds that will be tried."""
        rising = weight.abs().reshape(-1).sort()[0]
        exact = rising.double()
        first, second = (torch.nn.functional.pad(t.cumsum(0), (1, 0)) for t in (exact, exact * exact))
        return cls(weight, rising, first, second, float(weight.mean()), float(weight.std(correction=0)))

    def bounds(self, share: float, bins: int) -> Tensor:
        """The upper bounds mu + sigma z_k of the bins, z_k = PhiInv((1 + k u) / 2) and u = (1 - share) / bins.

        Without a tail the last bound is infinite.
        """
        tail = share if share > MIN_SHARE else 0.0
        z = torch.from_numpy(ndtri([(1 + (k + 1) * (1 - tail) / bins) / 2 for k in range(bins)]))
        bounds = (self.mean + self.deviation * z).float()
        if not tail:
            bounds[-1] = torch.inf  # also where the deviation is 0
        return bounds.to(self.rising.device)

    def _places(self, bounds: Tensor) -> Tensor:
        """The places in rising order where bins begin and end."""
        return torch.nn.functional.pad(torch.searchsorted(self.rising, bounds, right=True), (1, 0))

    def means(self, bounds: Tensor) -> Tensor:
        """The mean magnitude of each bin; 0 for an empty one."""
        places = self._places(bounds)
        return (self.first[places].diff() / places.diff().clamp(min=1)).float()

    def error(self, share: float, bins: int, dtype: torch.dtype) -> float:
        """The squared error of all bins and of the tail."""
        bounds = self.bounds(share, bins)
        places = self._places(bounds)
        inside = self.second[places].diff() - self.first[places].diff().square() / places.diff().clamp(min=1)
        total = float(inside.sum())
        if share <= MIN_SHARE:
            return total
        tail = self.weight.abs() > bounds[-1]
        rows, values = tail.nonzero()[:, 0], self.weight[tail]
        scale, center, tail_codes = salient(values, rows, len(self.weight), dtype)
        return total + float((values - salient_levels(center)[tail_codes] * scale[rows]).square().sum())


def salient(values: Tensor, rows: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A scale per row, the mean and deviation of the scaled weights, and the code of the nearest of the four levels.

    Starting from b = sign(w), the row scales a = sum w b / sum b^2 and b = clip(w / a, -1, 1) are computed alternately.
    """
    b, scale = values.sign(), torch.ones(count, device=values.device)
    for _ in range(ITERATIONS):
        top, bottom = (torch.zeros_like(scale).index_add_(0, rows, t) for t in (values * b, b * b))
        scale = as_16_bit(
            torch.where(bottom > 0, top / bottom.clamp(min=torch.finfo(torch.float32).tiny), scale), dtype
        )
        b = (values / scale[rows].clamp(min=torch.finfo(torch.float32).tiny)).clamp(-1, 1)
    nonzero = b[b != 0]
    if not len(nonzero):
        return scale, torch.zeros(2, device=values.device), torch.zeros_like(rows)
    center = as_16_bit(torch.stack([nonzero.mean(), nonzero.std(correction=0)]), dtype)
    return scale, center, (b[:, None] - salient_levels(center)).abs().argmin(1)
