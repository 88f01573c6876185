"""Cost of rounding errors: e H e', taken in full only of candidates that a few directions of H do not rule out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRIP = 64  # columns of a Gram matrix in one product
SHARE = 8  # one direction for so many columns: on a trained model's layers those hold .7 to .95 of what errors cost
FAINT = 1e-6  # directions with less than this of the largest are noise of the Gram matrix's 32 bits
SLACK = 1e-3  # by which a bound could be too high, for all that rounding to 32 bits does to it


@dataclass(frozen=True)
class ErrorCost:
    """What an error costs in each group of columns on its own; what groups do to each other is left out."""

    exact: Sequence[Tensor]  # of each group, H folded onto its upper half (size x size), or a weight for each column
    few: Sequence[Tensor]  # of each group, F with F F' <= H (size x directions); empty where H is small

    @classmethod
    def of(cls, curvature: Tensor, size: int) -> ErrorCost:
        """`curvature` is a Gram matrix, of which each group uses its own block, or a weight for each column."""
        if curvature.dim() == 1:
            return cls(torch.split(curvature, size), ())
        blocks = [curvature[i : i + size, i : i + size] for i in range(0, len(curvature), size)]
        return cls([halved(block) for block in blocks], [directions(block) for block in blocks] if size > STRIP else ())

    def under(self, scale: Tensor) -> ErrorCost:
        """The same for weights whose columns were multiplied by a scale, and whose inputs are divided by it."""
        scales = torch.split(scale, len(self.exact[0]))
        return ErrorCost(
            [half / s[:, None] / s for half, s in zip(self.exact, scales, strict=True)],
            [few / s[:, None] for few, s in zip(self.few, scales, strict=False)],
        )

    def cheapest(self, group: int, error: Tensor) -> Tensor:
        """The first of the cheapest candidates for each row: error is candidates x rows x size, and is used up."""
        exact = self.exact[group]
        if exact.dim() == 1:
            return error.square_().mul_(exact).sum(-1).argmin(0)
        if not self.few:
            return quadratic(error.flatten(0, 1), exact).reshape(error.shape[:2]).argmin(0)
        bound = (error @ self.few[group]).square_().sum(-1)
        cost = torch.full_like(bound, math.inf)
        first = bound.argmin(0), torch.arange(bound.shape[1], device=bound.device)
        cost[first] = quadratic(error[first], exact)
        left = bound * (1 - SLACK) < cost[first]
        left[first] = False
        cost[left] = quadratic(error[left], exact)
        return cost.argmin(0)


def quadratic(error: Tensor, half: Tensor) -> Tensor:
    """e H e' of each row, from H folded onto its upper half: the lower half of the products is never taken."""
    total = torch.zeros(len(error), device=error.device)
    for a in range(0, len(half), STRIP):
        b = min(a + STRIP, len(half))
        total += (error[:, :b] @ half[:b, a:b]).mul_(error[:, a:b]).sum(1)
    return total


def halved(gram: Tensor) -> Tensor:
    """A symmetric matrix folded onto its upper half, which gives the same e H e'."""
    return gram.triu(1).mul_(2) + gram.diagonal().diag_embed()


def directions(gram: Tensor) -> Tensor:
    """F with F F' <= H, and nearly H where it is largest: Nyström's approximation, after one step of power iteration.

    What is left, H - F F', is positive, so e F F' e' is never more than e H e'.
    """
    count = -(-len(gram) // SHARE)
    basis = torch.linalg.qr(gram[:, gram.diagonal().topk(count).indices])[0]
    exact = torch.linalg.qr(gram @ basis)[0].double()
    image = gram.double() @ exact
    values, vectors = torch.linalg.eigh(exact.T @ image)
    kept = values > FAINT * values[-1].clamp(min=0)  # inputs of few tokens, or of dead channels, have fewer directions
    few: Tensor = (image @ vectors[:, kept]) / values[kept].sqrt()
    return few.to(gram.dtype).contiguous()
