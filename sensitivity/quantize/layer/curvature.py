"""Statistics of a layer's inputs: the weighted Gram matrix H, and its factor that every solver shares."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sensitivity.quantize.layer.exact_products import exact_in_tf32
from sensitivity.quantize.layer.two_paths import TwoPaths
from sensitivity.spec.errors import Notice, UserError

COLUMNS_PER_PRODUCT = 256  # a product of this width is as fast per FLOP as wider ones
NUMBERS_AT_ONCE = 2**16  # numbers that one step swaps when a matrix is reversed in place
DAMPING_GROWTH = 10.0  # factor on the damping after each failed Cholesky factorization


@dataclass(frozen=True)
class Factor:
    """The factorization H + damping = M D M', M upper triangular with a unit diagonal, columns in `order`.

    Columns are rounded from left to right. Given the residuals E = W - Q of the columns before it, the best target for
    column j is w_j + sum_{k<j} E_k M_kj. This is GPTQ's update (Frantar et al. 2023) without the inverse of H: Chee et
    al. 2023 (QuIP), theorem 6, show that the two give the same weights.
    """

    unit: Tensor  # M
    importance: Tensor  # the diagonal of D: what a column's error costs after all later columns have compensated for it
    order: Tensor | None  # the order in which columns are rounded; None: as they are stored
    damp: float  # relative to the mean of H's diagonal


class Curvature:
    """Statistics of a layer's inputs: H = sum r x x', the number of tokens, and each channel's range and sum |x|.

    The sum |x| is of all tokens alike, as in MBQ: token weights belong to the error that a method minimizes, not to the
    scales that it tries.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(width, width, device=device)
        self.magnitude = torch.zeros(width, device=device)
        self.low, self.high = torch.zeros(width, device=device), torch.zeros(width, device=device)
        self.weight = 0.0  # sum r
        self.tokens = 0
        self.read = 0  # tokens in `magnitude`, those of weight 0 among them
        self.modalities = torch.zeros(4, dtype=torch.long)  # how many tokens of padding, vision, prompt and answer
        self.paths: TwoPaths | None = None  # where inputs are known on both calibration paths
        self._factor: tuple[tuple[float, bool], Factor] | None = None

    def add(self, inputs: Tensor, importance: Tensor | None = None) -> None:
        """Add tokens (tokens x width), each with its own weight r or 1.

        A token of weight 0 counts in the mean magnitudes alone.
        """
        values = inputs.float()
        self.magnitude += values.abs().sum(0)
        self.read += len(values)
        scaled = values
        if importance is not None:
            r = importance.to(values)
            values, r = values[r > 0], r[r > 0]
            scaled = values * r[:, None]
            self.weight += float(r.sum())
        else:
            self.weight += len(values)
        self.tokens += len(values)
        if len(values):
            low, high = torch.aminmax(values, dim=0)
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        with exact_in_tf32(inputs if importance is None else scaled):
            _add_symmetric(self.gram, values, scaled)
        self._factor = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a file stores; `of` makes statistics from them again."""
        totals = torch.tensor([self.weight, self.tokens, self.read], dtype=torch.float64)
        sums = {"gram": self.gram, "magnitude": self.magnitude, "totals": totals, "modalities": self.modalities}
        return {**sums, "low": self.low, "high": self.high}

    @property
    def content(self) -> list[Tensor]:
        """The tensors that quantized weights depend on: their hash identifies these statistics in the cache."""
        both = [] if self.paths is None else [self.paths.cross, self.paths.image]
        totals = torch.tensor([self.weight, self.read], dtype=torch.float64)  # by which the sums are divided
        return [self.gram, self.magnitude, self.low, self.high, totals, *both]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Curvature:
        """The statistics from what `tensors` returned."""
        self = cls.__new__(cls)
        self.gram, self.magnitude = tensors["gram"], tensors["magnitude"]
        self.low, self.high = tensors["low"], tensors["high"]
        totals = tensors["totals"].tolist()
        self.weight, self.tokens, self.read = totals[0], int(totals[1]), int(totals[2])
        self.modalities, self._factor, self.paths = tensors["modalities"].cpu(), None, None
        return self

    @property
    def width(self) -> int:
        """The number of input channels."""
        return len(self.magnitude)

    @property
    def mean_magnitude(self) -> Tensor:
        """Mean |x| of each channel over all tokens, whatever their weights."""
        return self.magnitude / max(self.read, 1)

    @property
    def largest(self) -> Tensor:
        """The largest |x| of each channel."""
        return torch.maximum(-self.low, self.high)

    def check(self, name: str) -> None:
        """Raise an error where the layer saw no token, or where its inputs were not finite."""
        if self.tokens == 0:
            raise UserError(
                f"{name} received no token of the calibration data, so it has no statistics; calibrate on a task that "
                "uses it, or leave it at native precision"
            )
        if not (torch.isfinite(self.magnitude).all() and torch.isfinite(self.gram.diagonal()).all()):
            raise UserError(
                f"the inputs of {name} are NaN or infinite on the calibration data; run the model in float32 or "
                "bfloat16 (--dtype), or look at the layers before this one"
            )

    def factor(self, damp: float = 0.01, by_activation: bool = False) -> Factor:
        """The factor of H, computed once and kept: it serves every bit width.

        Damping rises until the matrix can be factorized.
        """
        if self._factor is None or self._factor[0] != (damp, by_activation):
            self._factor = (damp, by_activation), self._factorize(damp, by_activation)
        return self._factor[1]

    def free_factor(self) -> None:
        """Free the factor, which is as large as the Gram matrix."""
        self._factor = None

    def _factorize(self, damp: float, by_activation: bool) -> Factor:
        """Factorize H, raising the damping until Cholesky succeeds; columns by falling diagonal if asked."""
        diagonal = self.gram.diagonal()
        order = torch.argsort(diagonal, descending=True, stable=True) if by_activation else None
        mean = float(diagonal.mean())
        if mean == 0:  # all inputs were zero: H says nothing, and M = I means round to nearest
            return Factor(torch.eye(self.width, device=self.gram.device), torch.ones_like(diagonal), order, damp)
        # torch gives H = L L' with L lower triangular. Reversing rows and columns before and after makes it upper
        # triangular, H = V V', and M = V / diag(V), D = diag(V)^2.
        reversed_order = torch.arange(self.width, device=self.gram.device).flip(0) if order is None else order.flip(0)
        tried = damp
        while True:
            # indexing copies, so damping is never added to `gram` itself, and each attempt starts from the undamped
            # matrix; everything after it works in this one copy, since H of a wide layer is as large as a small model
            lower = self.gram[reversed_order[:, None], reversed_order].mT
            lower.diagonal().add_(tried * mean)
            failed = torch.empty((), dtype=torch.int32, device=lower.device)
            torch.linalg.cholesky_ex(lower, out=(lower, failed))
            scale = lower.diagonal().clone()
            if not failed and bool(torch.isfinite(scale).all()):
                break
            # without the floor, a damping of 0 would never rise
            tried = max(tried, 1e-4) * DAMPING_GROWTH
        if tried > damp:
            # no layer's name in the message: warnings with equal text are shown once, however many layers are affected
            why = "since a Gram matrix would not factorize; more calibration examples help (--calibration-n)"
            warnings.warn(f"damping raised from {damp:g} to {tried:g}, {why}", Notice, stacklevel=2)
        return Factor(_reverse_in_place(lower.div_(scale)), scale.flip(0).square(), order, tried)


def _reverse_in_place(lower: Tensor) -> Tensor:
    """Reverse rows and columns of a column-major matrix in place, by reversing all its numbers in memory."""
    numbers = lower.mT.view(-1)
    half, count = len(numbers) // 2, len(numbers)
    for a in range(0, half, NUMBERS_AT_ONCE):
        b = min(a + NUMBERS_AT_ONCE, half)
        front = numbers[a:b].flip(0)
        numbers[a:b] = numbers[count - b : count - a].flip(0)
        numbers[count - b : count - a] = front
    return lower


def _add_symmetric(gram: Tensor, values: Tensor, scaled: Tensor) -> None:
    """Add X'RX by blocks on and above the diagonal, then mirror it, which takes little more than half of the products.

    For the wide inputs of feed-forward layers these products are half of the calibration time. Mirroring also makes
    the sum symmetric to the last bit.
    """
    width = len(gram)
    for a in range(0, width, COLUMNS_PER_PRODUCT):
        b = min(a + COLUMNS_PER_PRODUCT, width)
        gram[a:b, a:].addmm_(values[:, a:b].T, scaled[:, a:])
        if b < width:
            gram[b:, a:b] = gram[a:b, b:].T
