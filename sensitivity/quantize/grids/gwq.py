"""GWQ: the elements with the largest gradients are kept in 16 bits, all others are rounded in groups."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sensitivity.quantize.grids.outliers import beside_outliers, largest
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.stored.integer_grid import encode, ranges, scale_and_zero
from sensitivity.quantize.stored.weight import StoredWeight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Scheme
from sensitivity.spec.stored_bits import outlier_count


def quantize_gwq(linears: Linears, schemes: Sequence[Scheme]) -> list[list[StoredWeight | None]]:
    """Keep the elements with the largest |gradient| as outliers, and round the others to nearest.

    Known from its abstract: one example, one backward pass, 1 % by the largest gradient, groups. Inferred: the share is
    of each weight, ranges leave outliers out, and with more examples |gradient| is the root of the summed squares.
    """
    if linears.fisher is None:
        raise UserError(f"{linears.name}: gwq needs gradients of the answer loss, which these statistics do not have")
    pairs = list(zip(linears.weights, linears.fisher, strict=True))
    return [
        [_one_weight(weight.detach().float(), fisher, scheme, linears) for weight, fisher in pairs]
        for scheme in schemes
    ]


def _one_weight(weight: Tensor, fisher: Tensor, scheme: Scheme, linears: Linears) -> StoredWeight:
    """Quantize one weight at one bit width."""
    kept = largest(fisher.float(), outlier_count(scheme["outliers"], *weight.shape))
    inside = weight.masked_fill(kept, 0)
    base = encode(inside, scheme, *scale_and_zero(inside, scheme, *ranges(inside, scheme), linears.dtype))
    return beside_outliers(base, weight, kept, linears.dtype)
