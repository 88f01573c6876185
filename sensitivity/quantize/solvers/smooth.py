"""Smoothing: moves the scale of large input channels into the weights, may rotate inputs, then rounds to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.solvers.learned_smoothing import learned
from sensitivity.quantize.stored.integer_grid import QuantizedWeight, encode, ranges, scale_and_zero, scale_as_16_bit
from sensitivity.quantize.stored.rotated import RotatedWeight, rotate
from sensitivity.spec.plan import Scheme

Smoothed = QuantizedWeight | RotatedWeight | None
BLOCK = 64  # channels that DuQuant's release rotates together
MIN_FACTOR = 1e-3  # factors are at least this, which 16-bit floats hold


def quantize_smooth(linears: Linears, schemes: Sequence[Scheme]) -> list[list[Smoothed]]:
    """Divide inputs by c = spread(x)^a / max|W|^(1 - a) of each channel, multiply weights by it, round to nearest.

    SmoothQuant (Xiao et al. 2023) has a = .5 and the largest magnitude as spread. With `transform` = hadamard, c is
    found after the rotation (QuantVGGT); with blocks, before it (DuQuant). With `scales` = norms, inputs are divided
    only if they are a norm's output; with a = 1 and the range as spread this is RepQ-ViT's reparameterization.
    """
    return [_smoothed(linears, scheme) for scheme in schemes]


def _smoothed(linears: Linears, scheme: Scheme) -> list[Smoothed]:
    seen, transform = linears.input_statistics, scheme.get("transform", "none")
    rows, gram, spread = linears.rows, seen.gram, seen.largest
    if transform == "hadamard":
        rows, gram = rotate(rows), rotate(rotate(gram).T).contiguous()
        # the largest inputs after a rotation are not known; rotated channels are nearly normal, so these are about
        # proportional to their root mean squares
        spread = gram.diagonal().clamp(min=0).sqrt()
    elif scheme["spread"] == "range":
        spread = seen.high - seen.low
    factor, share = torch.ones_like(spread), None
    if {"folded": linears.foldable, "norms": linears.after_norm}.get(str(scheme["scales"]), True):
        factor = scale_as_16_bit(_factor(rows, spread, float(scheme["exponent"] or 0)), linears.dtype)
        if epochs := int(scheme.get("learned") or 0):
            found, share = learned(rows, gram, factor, scheme, epochs)
            factor = scale_as_16_bit(found, linears.dtype)
    inputs = None if bool((factor == 1).all()) else factor
    rows = rows * factor
    if transform != "blocks":
        pieces = linears.split(replace(_rounded(rows, scheme, linears.dtype, share), inputs=inputs))
        return [RotatedWeight(one) if one and transform == "hadamard" else one for one in pieces]
    pieces = linears.split(_rounded(rotate(rows, BLOCK), scheme, linears.dtype, share))
    return [None if one is None else RotatedWeight(one, inputs, BLOCK) for one in pieces]


def _factor(rows: Tensor, spread: Tensor, exponent: float) -> Tensor:
    """The factor of each channel, with a mean of 1, since one factor on all channels changes nothing."""
    of_weights = rows.abs().amax(0)
    found = spread.pow(exponent) / of_weights.clamp(min=torch.finfo(torch.float32).tiny).pow(1 - exponent)
    found = torch.where((spread > 0) & (of_weights > 0), found, torch.zeros_like(found))
    if not bool((found > 0).any()):
        return torch.ones_like(found)
    alive = found[found > 0]
    found = torch.where(found > 0, found, alive.mean()) / alive.mean()
    return found.clamp(min=MIN_FACTOR)


def _rounded(rows: Tensor, scheme: Scheme, dtype: torch.dtype, share: Tensor | None) -> QuantizedWeight:
    """Round to nearest, in the given share of each row's range."""
    low, high = ranges(rows, scheme)
    low, high = (low, high) if share is None else (low * share, high * share)
    return encode(rows, scheme, *scale_and_zero(rows, scheme, low, high, dtype))
