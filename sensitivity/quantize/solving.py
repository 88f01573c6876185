"""solve() and fake_quantize(): quantize weights with the methods that their schemes name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.methods import method_of
from sensitivity.quantize.stored.weight import StoredWeight
from sensitivity.spec.plan import Scheme


def solve(linears: Linears, schemes: Sequence[Scheme]) -> list[list[StoredWeight | None]]:
    """Quantize weights that share an input: for each scheme, one result per weight.

    A result is None where there is nothing to round.
    """
    results: dict[Scheme, Sequence[StoredWeight | None]] = {}
    for alike in _by_settings(schemes):
        results.update(zip(alike, method_of(alike[0]).solve(linears, alike), strict=True))
    return [list(results[scheme]) for scheme in schemes]


def fake_quantize(weight: Tensor, scheme: Scheme, curvature: Curvature | None = None) -> Tensor:
    """Quantize and dequantize one weight; the result has the weight's own dtype."""
    ((result,),) = solve(Linears(("the weight",), (weight.detach(),), curvature), [scheme])
    return weight.detach().clone() if result is None else result.dequantize().to(weight.dtype)


def _by_settings(schemes: Iterable[Scheme]) -> list[list[Scheme]]:
    """Schemes in lists whose members differ in bits alone, in order of bits."""
    by_settings: dict[Scheme, list[Scheme]] = {}
    for scheme in sorted(set(schemes), key=lambda s: s.bits):
        by_settings.setdefault(replace(scheme, bits=1), []).append(scheme)
    return list(by_settings.values())
