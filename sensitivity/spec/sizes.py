"""What plans weigh: the only place where bits and bytes are counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.plan import Plan, Scheme, scheme_of

LABEL = 112  # bytes of a tensor's entry in a safetensors header beside its name, at most


PAPER_NATIVE_BITS = 16  # what the published bpw figures give every weight that is not quantized


@dataclass(frozen=True)
class Size:
    """What a plan weighs. `bpw` counts all that is stored; `bpw_codes` is the papers' convention.

    Examples:
        >>> weighs = size(parts, plan)
        >>> weighs.bytes == weighs.bits / 8, weighs.bpw == weighs.bits / weighs.numel
        (True, True)
    """

    bits: int
    codes: int
    numel: int
    bpw_codes: float
    format: str | None = None  # of the files that are counted; None: what the methods themselves store

    @property
    def bytes(self) -> int:
        return math.ceil(self.bits / 8)

    @property
    def bpw(self) -> float:
        return self.bits / self.numel

    @property
    def how(self) -> str:
        """How it was counted, in words."""
        return "all stored" if self.format is None else f"all stored in {self.format} files"

    def to_json(self) -> dict[str, Any]:
        found = {"bytes": self.bytes, "bpw": self.bpw, "bpw_codes": self.bpw_codes}
        return found if self.format is None else {**found, "format": self.format}


def groups(scheme: Scheme, rows: int, cols: int) -> int:
    """How many groups of weights have a scale of their own; a last, shorter group of a row counts as one."""
    if scheme.group == "tensor":
        return 1
    return rows if scheme.group == "row" else rows * math.ceil(cols / int(scheme.group))


def _affine(scheme: Scheme, rows: int, cols: int) -> int:
    """A 16-bit scale per group, and a zero point as wide as a code where the grid is asymmetric."""
    return groups(scheme, rows, cols) * (16 + (0 if scheme.symmetric else scheme.bits))


def _scaled(scheme: Scheme, rows: int, cols: int) -> int:
    """And a 16-bit scale per input channel, unless it is folded into what stands before."""
    return _affine(scheme, rows, cols) + (0 if scheme.get("scales") == "folded" else 16 * cols)


def _blocks(scheme: Scheme, rows: int, cols: int) -> int:
    """As bitsandbytes stores them: the table of 16 numbers, and a float32 scale for each block of the flattened weight.

    With `double`, scales take 8 bits, and beside them a mean, a float32 scale per 256 and a table of 256 numbers.
    """
    if isinstance(scheme.group, str):
        raise UserError(f"{scheme.method} has blocks of a number of weights (its group), not '{scheme.group}'")
    blocks = math.ceil(rows * cols / scheme.group)
    table = 16 * 32
    if scheme.get("double"):
        return table + 8 * blocks + 32 * (math.ceil(blocks / 256) + 1 + 256)
    return table + 32 * blocks


# method -> bits stored beside the codes of a rows x cols weight
OVERHEAD: dict[str, Callable[[Scheme, int, int], int]] = {
    "uniform": lambda scheme, rows, cols: 64 * groups(scheme, rows, cols),  # minimum and range, float32
    "rtn": _affine,
    "clip": _affine,
    "gptq": _affine,
    "awq": _scaled,
    "nf4": _blocks,
    "fp4": _blocks,
    "llm-int8": lambda scheme, rows, cols: 32 * rows,
    "codes": lambda scheme, rows, cols: 0,  # an imported table: nothing is known beyond the widths
}


def _words(bits: int) -> int:
    """Bits, filled up to whole 32-bit words."""
    return 32 * math.ceil(bits / 32)


def _compressed_tensors(scheme: Scheme, rows: int, cols: int) -> int:
    """Rows of whole words, a 16-bit scale per group, the shape; zero points packed along the rows."""
    stored = rows * _words(cols * scheme.bits) + 16 * groups(scheme, rows, cols) + 2 * 64
    if scheme.symmetric:
        return stored
    return stored + (8 if scheme.group == "tensor" else groups(scheme, 1, cols) * _words(rows * scheme.bits))


def _awq(scheme: Scheme, rows: int, cols: int) -> int:
    """Codes, and for every group a 16-bit scale and a zero point, of symmetric grids too."""
    return scheme.bits * rows * cols + groups(scheme, rows, cols) * (16 + scheme.bits)


def _gptq(scheme: Scheme, rows: int, cols: int) -> int:
    """The same, and 32 bits per column that name its group."""
    return _awq(scheme, rows, cols) + 32 * cols


# format of files -> all bits that it stores of a rows x cols weight; other formats leave that to the runtime's own tool
FILES: dict[str, Callable[[Scheme, int, int], int]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "auto-round": _gptq,
    "awq": _awq,
    "float32": lambda scheme, rows, cols: 32 * rows * cols,  # the values themselves
    "float16": lambda scheme, rows, cols: 16 * rows * cols,
    "bfloat16": lambda scheme, rows, cols: 16 * rows * cols,
}


def weight_bits(scheme: Scheme | None, weight: Weight, native_bits: int, format: str | None = None) -> int:
    """All bits that one weight takes, as its method counts them or as a format of files stores it."""
    if scheme is None:
        return native_bits * weight.numel
    scheme = scheme_of(weight, scheme)
    if format in FILES:
        return FILES[format](scheme, weight.rows, weight.cols)
    if scheme.method not in OVERHEAD:
        raise unknown("method", scheme.method, OVERHEAD)
    overhead = OVERHEAD[scheme.method]
    stored = scheme.bits * weight.numel + overhead(scheme, weight.rows, weight.cols)
    if weight.bias and scheme.get("biases"):  # the bias is counted among the kept weights: only the change is added
        stored += (scheme.bits - native_bits) * weight.rows + overhead(scheme, 1, weight.rows)
    return stored


def component_bits(parts: ComponentMap, name: str, scheme: Scheme | None, format: str | None = None) -> int:
    return sum(weight_bits(scheme, w, parts.native_bits, format) for w in parts[name].weights)


def size(parts: ComponentMap, plan: Plan, format: str | None = None) -> Size:
    """What a plan weighs, everything counted: codes, scales, zero points, codebooks, kept weights.

    With a format of files, as that stores it: some keep zero points of symmetric grids, or the group of each column.

    Examples:
        >>> from sensitivity import size
        >>> size(parts, plan).bpw > size(parts, Plan.uniform(parts, scheme("rtn", 4))).bpw
        True
    """
    plan.check(parts)
    kept = sum(k.numel for k in parts.kept)
    stored = kept * parts.native_bits
    stored += sum(component_bits(parts, c.name, plan[c.name], format) for c in parts.components)
    codes = sum(c.numel * (s.bits if (s := plan[c.name]) else PAPER_NATIVE_BITS) for c in parts.components)
    bpw_codes = (codes + kept * PAPER_NATIVE_BITS) / parts.numel
    return Size(stored, codes, parts.numel, bpw_codes, format if format in FILES else None)


def labels(parts: ComponentMap) -> int:
    """Bytes of names, shapes and places of a model's tensors in files of packed weights, at most.

    A packed weight is four tensors or fewer, and each takes its name and some 90 characters more.
    """
    packed = sum(4 * (len(weight.name) + LABEL) for weight in parts.weights)
    return packed + sum(len(kept.name) + LABEL for kept in parts.kept)


def uniform_sizes(parts: ComponentMap, schemes: Iterable[Scheme]) -> dict[int, Size]:
    return {scheme.bits: size(parts, Plan.uniform(parts, scheme)) for scheme in schemes}
