"""The memory of a weight while a runtime runs it: the runtime's own copy, and the pages of the mapped file."""

from __future__ import annotations

from collections.abc import Callable

from sensitivity.spec.components import Weight
from sensitivity.spec.plan import KEEP, Scheme, scheme_of
from sensitivity.spec.sizes import weight_bits
from sensitivity.spec.stored_bits import groups, openvino_width

FLOAT = 32  # bits of the floats that OpenVINO computes with


def _openvino(scheme: Scheme | None, weight: Weight) -> int:
    """Bits of OpenVINO's own copy: codes stay packed; scales, zero points and what is kept become floats."""
    if scheme is None or scheme.method == KEEP:
        return FLOAT * weight.numel
    scheme = scheme_of(weight, scheme)
    per_group = FLOAT * (1 if scheme.symmetric else 2)
    return openvino_width(scheme.bits) * weight.numel + per_group * groups(scheme, weight.rows, weight.cols)


# runtime -> bits of the copy that it makes of a weight, to which `resident_bytes` adds the mapped file
COPIES: dict[str, Callable[[Scheme | None, Weight], int]] = {"openvino": _openvino}


def resident_bytes(runtime: str, scheme: Scheme | None, weight: Weight, native_bits: int) -> float:
    """Bytes of a weight in memory: the copy (anonymous pages) and the file (mapped pages)."""
    return (COPIES[runtime](scheme, weight) + weight_bits(scheme, weight, native_bits, runtime)) / 8
