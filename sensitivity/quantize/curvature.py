"""What a layer's inputs say about its weights: the weighted Gram matrix, and the factor that every solver shares."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sensitivity.spec.errors import Notice, UserError

PIECE = 256  # columns: a product of pieces this wide is as quick for its size as a whole one
RAISE = 10.0  # how much more damping each further attempt gets


@dataclass(frozen=True)
class Factor:
    """H + damping = M D M' with M upper triangular and ones on its diagonal, columns in `order`.

    Rounding column by column from the left, the best target for column j, given the residuals E = W - Q of those
    before it, is w_j + sum_{k<j} E_k M_kj. This is GPTQ's update (Frantar et al. 2023) without its inverse: Chee et
    al. 2023 (QuIP), theorem 6, show that the two give the same weights.
    """

    unit: Tensor
    importance: Tensor  # the diagonal of D: what a column's rounding costs, once all later ones have made up for it
    order: Tensor | None  # None: as they stand
    damp: float  # relative to the mean of H's diagonal


class Curvature:
    """Sums over the tokens that a layer saw: H = sum r x x', sum r |x| per channel, and how many there were."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(width, width, device=device)
        self.magnitude = torch.zeros(width, device=device)
        self.weight = 0.0
        self.tokens = 0
        self.modalities = torch.zeros(4, dtype=torch.long)  # tokens: padding, vision, prompt, answer
        self._factor: tuple[tuple[float, bool], Factor] | None = None

    def add(self, inputs: Tensor, importance: Tensor | None = None) -> None:
        """Add tokens (tokens x width), each with a weight r of its own or 1; a weight of 0 does not count as seen."""
        values = inputs.float()
        scaled = values
        if importance is not None:
            r = importance.to(values)
            values, r = values[r > 0], r[r > 0]
            scaled = values * r[:, None]
            self.weight += float(r.sum())
        else:
            self.weight += len(values)
        self.tokens += len(values)
        _add_symmetric(self.gram, values, scaled)
        self.magnitude += scaled.abs().sum(0)
        self._factor = None

    def add_outer(self, gradient: Tensor) -> None:
        """Add G'G of one sample's weight gradient (rows x width), the curvature of the loss itself (OAC)."""
        values = gradient.float()
        _add_symmetric(self.gram, values, values)
        self.weight += 1
        self.tokens += 1
        self._factor = None

    def tensors(self) -> dict[str, Tensor]:
        """All of it, to be stored."""
        totals = torch.tensor([self.weight, self.tokens], dtype=torch.float64)
        return {"gram": self.gram, "magnitude": self.magnitude, "totals": totals, "modalities": self.modalities}

    @property
    def content(self) -> list[Tensor]:
        """What quantized weights depend on."""
        return [self.gram, self.magnitude, torch.tensor(self.weight, dtype=torch.float64)]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Curvature:
        """What `tensors` gave."""
        self = cls.__new__(cls)
        self.gram, self.magnitude = tensors["gram"], tensors["magnitude"]
        self.weight, self.tokens = float(tensors["totals"][0]), int(tensors["totals"][1])
        self.modalities, self._factor = tensors["modalities"].cpu(), None
        return self

    @property
    def width(self) -> int:
        return len(self.magnitude)

    @property
    def mean_magnitude(self) -> Tensor:
        """Mean |x| of each channel."""
        return self.magnitude / max(self.weight, torch.finfo(torch.float32).tiny)

    @property
    def dead(self) -> Tensor:
        """Channels that were always zero: nothing is known about their weights, which are then rounded to nearest."""
        return self.gram.diagonal() == 0

    def check(self, name: str) -> None:
        """A layer must have seen tokens, and numbers in them."""
        if self.tokens == 0:
            raise UserError(
                f"{name} saw no token of the calibration data, so nothing is known about it; calibrate on a task that "
                "uses it, or leave it at native precision"
            )
        if not (torch.isfinite(self.magnitude).all() and torch.isfinite(self.gram.diagonal()).all()):
            raise UserError(
                f"the inputs of {name} are NaN or infinite on the calibration data; run the model in float32 or "
                "bfloat16 (--dtype), or look at what stands before this layer"
            )

    def factor(self, damp: float = 0.01, by_activation: bool = False) -> Factor:
        """Computed once and kept: it serves every width. Damping rises until the matrix can be factorized."""
        if self._factor is None or self._factor[0] != (damp, by_activation):
            self._factor = (damp, by_activation), self._factorize(damp, by_activation)
        return self._factor[1]

    def forget(self) -> None:
        """Let go of the factor, which is as large as the Gram matrix."""
        self._factor = None

    def _factorize(self, damp: float, by_activation: bool) -> Factor:
        diagonal = self.gram.diagonal()
        order = torch.argsort(diagonal, descending=True, stable=True) if by_activation else None
        mean = float(diagonal.mean())
        if mean == 0:  # inputs of nothing but zeros: every rounding is as good, and nearest is the plainest
            return Factor(torch.eye(self.width, device=self.gram.device), torch.ones_like(diagonal), order, damp)
        # Cholesky of the matrix turned by half a circle, turned back, is upper triangular: H = V V'
        turn = torch.arange(self.width, device=self.gram.device).flip(0) if order is None else order.flip(0)
        tried = damp
        while True:
            turned = self.gram[turn[:, None], turn]  # one matrix at a time: each may be as large as a small model
            turned.diagonal().add_(tried * mean)
            lower, failed = torch.linalg.cholesky_ex(turned)
            del turned
            scale = lower.diagonal().clone()
            if not failed and bool(torch.isfinite(scale).all()):
                break
            tried = max(tried, 1e-4) * RAISE
        if tried > damp:
            # without the layer's name: the same words are shown once, however many layers it is true of
            why = "since a Gram matrix would not factorize; more calibration examples help (--calibration-n)"
            warnings.warn(f"damping raised from {damp:g} to {tried:g}, {why}", Notice, stacklevel=2)
        unit = lower.div_(scale).flip(0, 1)
        return Factor(unit, scale.flip(0).square(), order, tried)


def _add_symmetric(gram: Tensor, values: Tensor, scaled: Tensor) -> None:
    """Add X'RX piece by piece on and above the diagonal, and mirror it: little more than half of the products.

    For the inputs of a tower's feed-forward that is half of calibration. The sum is symmetric to the last bit.
    """
    width = len(gram)
    for a in range(0, width, PIECE):
        b = min(a + PIECE, width)
        gram[a:b, a:].addmm_(values[:, a:b].T, scaled[:, a:])
        if b < width:
            gram[b:, a:b] = gram[a:b, b:].T
