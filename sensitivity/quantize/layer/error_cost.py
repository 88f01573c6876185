"""The cost e H e' of rounding errors, with a cheap lower bound that rules most candidates out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRIP = 64  # columns of the Gram matrix per matrix product
# the lower bound keeps one direction of H per this many columns; on a trained model it is .7 to .95 of the cost
COLUMNS_PER_DIRECTION = 8
NOISE_FLOOR = 1e-6  # eigenvalues below this share of the largest are float32 noise of the Gram matrix
SLACK = 1e-3  # relative margin, since float32 rounding could lift the bound above the true cost


@dataclass(frozen=True)
class ErrorCost:
    """The cost of rounding errors within each group of columns; products across groups are left out."""

    exact: Sequence[Tensor]  # per group: H folded onto its upper half (size x size), or one weight per column
    low_rank: Sequence[Tensor]  # per group: F with F F' <= H (size x directions); empty where `exact` is cheap enough

    @classmethod
    def of(cls, gram_or_weights: Tensor, size: int) -> ErrorCost:
        """The cost by a Gram matrix, of which each group uses its own diagonal block, or by one weight per column."""
        if gram_or_weights.dim() == 1:
            return cls(torch.split(gram_or_weights, size), ())
        gram = gram_or_weights
        blocks = [gram[i : i + size, i : i + size] for i in range(0, len(gram), size)]
        return cls(
            [upper_half(block) for block in blocks],
            [low_rank_factor(block) for block in blocks] if size > STRIP else (),
        )

    def under(self, scale: Tensor) -> ErrorCost:
        """The cost for weights whose columns are multiplied by `scale` while their inputs are divided by it.

        An error e of a scaled weight is an error e / scale of the original one, so the rows and columns of H are
        divided by it.
        """
        scales = torch.split(scale, len(self.exact[0]))
        return ErrorCost(
            [half / s[:, None] / s for half, s in zip(self.exact, scales, strict=True)],
            # not strict, since `low_rank` may be empty
            [low_rank / s[:, None] for low_rank, s in zip(self.low_rank, scales, strict=False)],
        )

    def cheapest(self, group: int, error: Tensor) -> Tensor:
        """The index of the cheapest candidate of each row; the first one where several tie.

        `error` (candidates x rows x size) may be overwritten.
        """
        exact = self.exact[group]
        if exact.dim() == 1:
            return error.square_().mul_(exact).sum(-1).argmin(0)
        if not self.low_rank:
            return quadratic(error.flatten(0, 1), exact).reshape(error.shape[:2]).argmin(0)
        # e F F' e' <= e H e' for every candidate. The exact cost of the candidate with the lowest bound therefore rules
        # out all candidates whose bound exceeds it. The others get their exact costs, so the minimum is exact.
        bound = (error @ self.low_rank[group]).square_().sum(-1)
        cost = torch.full_like(bound, math.inf)
        first = bound.argmin(0), torch.arange(bound.shape[1], device=bound.device)
        cost[first] = quadratic(error[first], exact)
        left = bound * (1 - SLACK) < cost[first]
        left[first] = False  # its exact cost is already known
        cost[left] = quadratic(error[left], exact)
        return cost.argmin(0)


def quadratic(error: Tensor, half: Tensor) -> Tensor:
    """e H e' of each row, from H folded onto its upper half.

    Strip by strip, only the products on and above the diagonal are computed, which is half of the work.
    """
    total = torch.zeros(len(error), device=error.device)
    for a in range(0, len(half), STRIP):
        b = min(a + STRIP, len(half))
        total += (error[:, :b] @ half[:b, a:b]).mul_(error[:, a:b]).sum(1)
    return total


def upper_half(gram: Tensor) -> Tensor:
    """A symmetric matrix folded onto its upper half: e H e' stays the same, with zeros below the diagonal."""
    return gram.triu(1).mul_(2) + gram.diagonal().diag_embed()


def low_rank_factor(gram: Tensor) -> Tensor:
    """F with F F' <= H and close to H in its largest directions: Nyström's approximation after one power iteration.

    H - F F' is positive semidefinite (a Schur complement), so e F F' e' never exceeds e H e'.
    """
    count = -(-len(gram) // COLUMNS_PER_DIRECTION)
    # columns with the largest diagonal are a good first guess of the range of H, and need no random numbers
    basis = torch.linalg.qr(gram[:, gram.diagonal().topk(count).indices])[0]
    # float64 from here on: F divides by the root of small eigenvalues, and the bound must not exceed the cost
    exact = torch.linalg.qr(gram @ basis)[0].double()
    image = gram.double() @ exact
    values, vectors = torch.linalg.eigh(exact.T @ image)
    kept = values > NOISE_FLOOR * values[-1].clamp(min=0)  # with few tokens or dead channels the rank of H is lower
    low_rank: Tensor = (image @ vectors[:, kept]) / values[kept].sqrt()
    return low_rank.to(gram.dtype).contiguous()
