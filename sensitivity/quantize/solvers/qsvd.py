"""QSVD: queries, keys and values are computed from one latent vector of low rank, which is all that is cached."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.stored.integer_grid import QuantizedWeight, encode, ranges, scale_and_zero
from sensitivity.quantize.stored.low_rank import LowRankWeight
from sensitivity.quantize.stored.rotated import rotate
from sensitivity.spec.plan import Scheme
from sensitivity.spec.stored_bits import latent_rank


def quantize_qsvd(linears: Linears, schemes: Sequence[Scheme]) -> list[list[LowRankWeight]]:
    """Factorize the stacked weights, rotate the latent vector, and round both factors to nearest.

    The rotation spreads the large elements of the latent vector over others, so that rounding it costs less; both
    factors absorb the rotation, so it is not stored. In the release ranks are chosen over all layers, by the gradient
    of the answer loss, and inputs are weighed channel by channel; here every layer keeps the same share of the rank,
    and the Gram matrix weighs inputs.
    """
    first, cols = schemes[0], linears.rows.shape[1]
    factor = linears.input_statistics.factor(float(first["damp"] or 0))
    root = factor.unit * factor.importance.sqrt()
    up, down = factors(linears.rows, root, latent_rank(first, cols), float(first["beta"] or 0))
    up, down = rotate(up), rotate(down.T).T.contiguous()
    found = []
    for scheme in schemes:
        shared, stacked = (_rounded(matrix, scheme, linears.dtype) for matrix in (down, up))
        pieces = linears.split(stacked)
        found.append([LowRankWeight(piece, shared) for piece in pieces if piece is not None])
    return found


def factors(rows: Tensor, root: Tensor, rank: int, beta: float) -> tuple[Tensor, Tensor]:
    """The two factors of given rank whose product errs least on inputs with the Gram matrix root root'.

    With the singular value decomposition W root = U S V', the factors are U S^(1 - beta) and S^beta V' root^-1; a
    larger beta puts more of the scale into the latent vector.
    """
    weighed = rows @ root
    # V, as the eigenvectors of (W root)' (W root); torch sorts eigenvalues upwards, so the largest are last
    directions = torch.linalg.eigh(weighed.T @ weighed)[1].flip(1)[:, :rank]
    # an eigenvector's sign is the library's own choice, and the rotation makes other numbers of another sign
    directions = directions * directions.gather(0, directions.abs().argmax(0)[None]).sign()
    scaled = weighed @ directions
    # the floor avoids a division by zero in directions in which the weights are zero
    sizes = scaled.norm(dim=0)
    sizes = sizes.clamp(min=float(sizes.max()) * 1e-6 + torch.finfo(torch.float32).tiny) ** beta
    down = torch.linalg.solve_triangular(root, directions.T, upper=True, left=False)
    return scaled / sizes, down * sizes[:, None]


def _rounded(matrix: Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """A factor, rounded to nearest with a scale per row."""
    return encode(matrix, scheme, *scale_and_zero(matrix, scheme, *ranges(matrix, scheme), dtype))
