"""Randomized Hadamard rotation: spreads large weights and large inputs over many columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.layer.two_paths import TwoPaths
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.quantize.stored.rotated import RotatedWeight, rotate
from sensitivity.spec.plan import Scheme

Solved = Sequence[Sequence[QuantizedWeight | None]]


def quantize_rotated(
    linears: Linears, schemes: Sequence[Scheme], solve: Callable[[Linears, Sequence[Scheme]], Solved]
) -> list[list[RotatedWeight | None]]:
    """Quantize W R under R' H R, for inputs R' x in place of x: the product W x stays the same.

    As in QuaRot and RSQ, R is a Hadamard matrix with random signs. They rotate the residual stream, and fuse R into the
    weights that write to it and read from it. Here each layer's input is rotated by itself in each forward pass, so
    that the rotation is exact in any model. The signs follow from the width and are not stored.
    """
    weights = tuple(rotate(weight.detach().float()) for weight in linears.weights)
    curvature = None if linears.curvature is None else _curvature(linears.curvature)
    turned = replace(linears, weights=weights, curvature=curvature, original_dtype=linears.dtype)
    return [[None if w is None else RotatedWeight(w) for w in results] for results in solve(turned, schemes)]


def _curvature(seen: Curvature) -> Curvature:
    """The statistics of rotated inputs: R' H R. Their magnitudes and ranges are not known, so the old ones stay."""
    after = Curvature.of(seen.tensors())
    after.gram = rotate(rotate(seen.gram).T).contiguous()
    if seen.paths is not None:
        after.paths = TwoPaths(seen.width, seen.gram.device)
        after.paths.cross = rotate(rotate(seen.paths.cross).T).T.contiguous()
    return after
