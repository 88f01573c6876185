"""SqueezeLLM: a codebook per row by weighted k-means, and a few outliers that are stored apart."""

from __future__ import annotations

from collections.abc import Sequence

from sensitivity.quantize.grids.kmeans import kmeans, nearest
from sensitivity.quantize.grids.outliers import beside_outliers, largest
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.stored.grid import as_16_bit
from sensitivity.quantize.stored.levels import LevelsWeight
from sensitivity.quantize.stored.weight import StoredWeight
from sensitivity.spec.plan import Scheme
from sensitivity.spec.stored_bits import outliers


def squeezellm(linears: Linears, schemes: Sequence[Scheme]) -> list[list[StoredWeight | None]]:
    """Round each weight to the nearest level of its row's codebook (Kim et al. 2023).

    Read in its code: k-means whose weights are the squared gradients of the loss; .05 % of the most sensitive numbers
    and .45 % of the largest are kept in 16 bits and do not count in the clustering; no compensation. Without `gradient`
    columns are weighed by the diagonal of the Gram matrix, and a number w is sensitive where H_jj w^2 is large. Ours:
    counts of outliers are exact shares, and the clustering starts from a dynamic program.
    """
    return [[_one(linears, i, scheme) for i in range(len(linears.weights))] for scheme in schemes]


def _one(linears: Linears, i: int, scheme: Scheme) -> StoredWeight:
    """One weight at one bit width."""
    weight = linears.weights[i].detach().float()
    fisher = linears.fisher[i].float() if linears.fisher is not None and scheme.get("gradient") else None
    importance = linears.input_statistics.gram.diagonal()[None] if fisher is None else fisher
    sensitive = largest(
        importance * weight.square() if fisher is None else fisher, outliers(scheme["sensitive"], *weight.shape)
    )
    size = weight.abs().masked_fill(sensitive, -1)  # those that are kept already are not counted twice
    kept = sensitive | largest(size, outliers(scheme["outliers"], *weight.shape))
    levels = as_16_bit(kmeans(weight, importance.expand_as(weight).masked_fill(kept, 0), 2**scheme.bits), linears.dtype)
    return beside_outliers(LevelsWeight(nearest(weight, levels), levels), weight, kept, linears.dtype)
