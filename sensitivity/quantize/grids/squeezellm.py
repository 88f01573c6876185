"""SqueezeLLM: a codebook per row by weighted k-means, and a few outliers that are stored apart."""

from __future__ import annotations

from collections.abc import Sequence

from sensitivity.quantize.grids.kmeans import kmeans_levels, nearest_levels
from sensitivity.quantize.grids.outliers import beside_outliers, largest
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.stored.integer_grid import as_16_bit
from sensitivity.quantize.stored.levels import LevelsWeight
from sensitivity.quantize.stored.weight import StoredWeight
from sensitivity.spec.plan import Scheme
from sensitivity.spec.stored_bits import outlier_count


def quantize_squeezellm(linears: Linears, schemes: Sequence[Scheme]) -> list[list[StoredWeight | None]]:
    """Round each weight to the nearest level of its row's codebook (Kim et al. 2023).

    Read in its code: k-means weighted by the squared gradients of the loss; the .05 % most sensitive elements and the
    .45 % largest are kept in 16 bits and do not count in the clustering; no error feedback. Without `gradient`, columns
    are weighed by the diagonal of the Gram matrix, and an element w is sensitive where H_jj w^2 is large. Ours:
    outliers are exact shares, and the clustering starts from dynamic programming.
    """
    return [[_one_weight(linears, i, scheme) for i in range(len(linears.weights))] for scheme in schemes]


def _one_weight(linears: Linears, i: int, scheme: Scheme) -> StoredWeight:
    """Quantize one weight at one bit width."""
    weight = linears.weights[i].detach().float()
    fisher = linears.fisher[i].float() if linears.fisher is not None and scheme.get("gradient") else None
    importance = linears.input_statistics.gram.diagonal()[None] if fisher is None else fisher
    sensitive = largest(
        importance * weight.square() if fisher is None else fisher, outlier_count(scheme["sensitive"], *weight.shape)
    )
    # sensitive elements are kept already, so they take no place among the largest
    size = weight.abs().masked_fill(sensitive, -1)
    kept = sensitive | largest(size, outlier_count(scheme["outliers"], *weight.shape))
    levels = as_16_bit(
        kmeans_levels(weight, importance.expand_as(weight).masked_fill(kept, 0), 2**scheme.bits), linears.dtype
    )
    return beside_outliers(LevelsWeight(nearest_levels(weight, levels), levels), weight, kept, linears.dtype)
