"""Counts bits and bytes: of plans, of choices, of budgets; and writes bytes in words."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from sensitivity.spec.components import ComponentMap, Kept, Weight
from sensitivity.spec.errors import UserError, check_is, unknown
from sensitivity.spec.plan import CACHE_GROUP, CACHE_SMOOTH, KEEP, NOT_ROUNDED, QSVD, Plan, Scheme, scheme_of
from sensitivity.spec.stored_bits import (
    CONFIGURED,
    FILES,
    GGUF_MATRICES,
    GGUF_UNREAD,
    LEAVE_OUT,
    OVERHEAD,
    SHARED,
    latent_rank,
)

MB, GB = 1e6, 1e9  # bytes, as disks and hubs count them

PAPER_NATIVE_BITS = 16  # bits that the published bpw figures count for every weight that is not quantized


class SizeJson(TypedDict):
    """What a file stores of a size."""

    bytes: NotRequired[int]  # only where the sizes of components are known
    bpw: float
    bpw_codes: float
    format: NotRequired[str]
    cache_bits: NotRequired[int]


@dataclass(frozen=True)
class Size:
    """The size of a plan: `bpw` counts everything that is stored; `bpw_codes` what papers count.

    Papers count code bits alone, and 16 bits for each weight that is not quantized.

    Examples:
        >>> weighs = size(parts, plan)
        >>> weighs.bytes == weighs.bits / 8, weighs.bpw == weighs.bits / weighs.numel
        (True, True)
    """

    bits: int
    codes: int  # bits of the components' codes alone
    numel: int
    bpw_codes: float
    format: str | None = None  # the format whose files are counted; None: what the methods themselves store
    # bits of keys and values per token, where a plan rounds some; not part of `bits`, since no file holds a cache
    cache_bits: int | None = None
    sized: bool = True  # False where the sizes of components are not known (see ComponentMap): no bytes then
    shaped: bool = True  # False where shapes are not known: scales and zero points are counted by rows and columns

    @property
    def bytes(self) -> int:
        """The size in whole bytes."""
        return math.ceil(self.bits / 8)

    @property
    def bpw(self) -> float:
        """Bits per weight of the whole model."""
        return self.bits / self.numel

    @property
    def counted(self) -> str:
        """What was counted, in words."""
        if not self.sized:
            return "as the mean width of the parts, whose sizes are not known"
        if not self.shaped:
            return "without scales, since shapes are not known"
        return "all stored" if self.format is None else f"all stored in {self.format} files"

    def to_json(self) -> SizeJson:
        """Bytes, where they are known, and bits per weight as JSON values."""
        content: SizeJson = {"bpw": self.bpw, "bpw_codes": self.bpw_codes}
        if self.sized:
            content = {"bytes": self.bytes, **content}
        if self.cache_bits is not None:
            content["cache_bits"] = self.cache_bits
        return content if self.format is None else {**content, "format": self.format}


def bytes_in_words(count: float) -> str:
    """A number of bytes with three digits and a unit, such as 13.5 GB."""
    if count < 1e3:
        return f"{count:.0f} bytes"
    for unit, name in ((GB, "GB"), (MB, "MB")):
        if count >= unit:
            return f"{count / unit:.{max(0, 2 - int(math.log10(count / unit)))}f} {name}"
    return f"{count / 1e3:.0f} kB"


def weight_bits(parts: ComponentMap, scheme: Scheme | None, weight: Weight, format: str | None = None) -> int:
    """All bits of one weight, as its method counts them or as a format stores them."""
    if scheme is None or scheme.method == KEEP:
        return parts.native_bits_of(weight.name) * weight.numel
    scheme = scheme_of(weight, scheme)
    if format in FILES:
        return FILES[format](scheme, weight.rows, weight.cols)
    if scheme.method not in OVERHEAD:
        own = "a method of your own needs a row in OVERHEAD of sensitivity/spec/stored_bits.py"
        raise UserError(f"{unknown('method', scheme.method, OVERHEAD)}; {own}")
    overhead = OVERHEAD[scheme.method]
    stored = scheme.bits * weight.numel + overhead(scheme, weight.rows, weight.cols)
    if weight.bias and scheme.get("biases"):  # the bias is counted as a kept weight: add the difference
        stored += (scheme.bits - parts.native_bits_of(weight.bias)) * weight.rows + overhead(scheme, 1, weight.rows)
    return stored


def component_bits(parts: ComponentMap, name: str, scheme: Scheme | None, format: str | None = None) -> int:
    """All bits of one component; of one without shapes its codes alone: scales are counted by rows and columns."""
    format = format if parts.shaped else None
    weights = [w for w in parts[name].weights if not _is_left_out(parts, w.name, format)]
    stored = sum(weight_bits(parts, scheme, w, format) for w in weights)
    if not parts.shaped:  # counted all the same: a scheme that its method cannot store is an error
        return parts[name].numel * (parts.native_bits if scheme is None or scheme.method == KEEP else scheme.bits)
    if scheme is not None and scheme.method in SHARED and format not in FILES:
        stored += SHARED[scheme.method](scheme, parts[name].weights)
    # a 16-bit divisor for each channel of keys and values
    smoothed = scheme is not None and scheme.get(CACHE_SMOOTH)
    return stored + (16 * sum(w.rows for w in parts[name].weights if w.cached) if smoothed else 0)


def bits_of(parts: ComponentMap, plan: Plan, names: Collection[str], format: str | None = None) -> int:
    """All bits of the weights and kept parameters that have these names."""
    kept = sum(_kept_width(parts, k, format) * k.numel for k in parts.kept if k.name in names)
    weights = (
        (plan[c.name], w)
        for c in parts.components
        for w in c.weights
        if w.name in names and not _is_left_out(parts, w.name, format)
    )
    return kept + sum(weight_bits(parts, scheme, w, format) for scheme, w in weights)


def kept_bits(parts: ComponentMap, format: str | None = None) -> int:
    """All bits of the weights that no plan changes."""
    format = format if parts.shaped else None
    return sum(_kept_width(parts, kept, format) * kept.numel for kept in parts.kept)


def _kept_width(parts: ComponentMap, kept: Kept, format: str | None) -> int:
    """Bits of one element of a kept weight.

    In GGUF 32 for norms and biases, since llama.cpp reads them in float32, and none for what it leaves out.
    """
    if _is_left_out(parts, kept.name, format) or (format == "gguf" and GGUF_UNREAD.match(kept.name)):
        return 0
    return 32 if format == "gguf" and kept.reason not in GGUF_MATRICES else parts.native_bits_of(kept.name)


def _is_left_out(parts: ComponentMap, name: str, format: str | None) -> bool:
    """Whether files of a format lack a parameter, since the model never reads it."""
    return format in LEAVE_OUT and name in parts.never_read


def choice_bits(
    parts: ComponentMap,
    groups: Iterable[Iterable[str]],
    choices: Iterable[Iterable[Scheme | None]],
    format: str | None = None,
) -> list[list[int]]:
    """For each group of components and each of its choices: the bits of the group's components together."""
    return [
        [sum(component_bits(parts, name, choice, format) for name in names) for choice in options]
        for names, options in zip(groups, choices, strict=True)
    ]


def budget_bits(parts: ComponentMap, bpw: float) -> int:
    """The bits that a budget in bits per weight allows the whole model."""
    return math.floor(bpw * parts.numel + 1e-6)  # without 1e-6, 4.1 bpw may round to a bit too few


def bits_in_bytes(count: float) -> int:
    """The whole bits in a number of bytes, which need not be whole."""
    return math.floor(8 * count + 1e-6)


def codes_in_mb(parts: ComponentMap, name: str, bits: float) -> float:
    """The megabytes of a component's codes at a bit width, or at a difference of widths."""
    return parts[name].numel * bits / (8 * MB)


def size(parts: ComponentMap, plan: Plan, format: str | None = None) -> Size:
    """The size of a plan with everything counted: codes, scales, zero points, codebooks, kept weights.

    With `format`, what files of that format store: some also hold zero points of symmetric grids, or the group of each
    column.

    Examples:
        >>> from sensitivity import size
        >>> size(parts, plan).bpw > size(parts, Plan.uniform(parts, scheme("rtn", 4))).bpw
        True
    """
    check_is("parts", parts, ComponentMap)
    check_is("plan", plan, Plan)
    if format is not None and format not in (known := (*FILES, *CONFIGURED)):
        raise unknown("format", format, known)
    plan.check(parts)
    kept = sum(k.numel for k in parts.kept)
    stored = kept_bits(parts, format)
    stored += sum(component_bits(parts, c.name, plan[c.name], format) for c in parts.components)
    # the papers count 16 bits for what is not quantized, whatever the checkpoint stores
    codes = sum(c.numel * (s.bits if (s := plan[c.name]) else PAPER_NATIVE_BITS) for c in parts.components)
    bpw_codes = (codes + kept * PAPER_NATIVE_BITS) / parts.numel
    format = format if format in FILES and parts.shaped else None
    return Size(stored, codes, parts.numel, bpw_codes, format, cache_bits(parts, plan), parts.sized, parts.shaped)


def cache_bits(parts: ComponentMap, plan: Plan) -> int | None:
    """Bits of all keys and values of one token; None where a plan rounds none of them.

    Beside its codes, a group of channels has a scale and a smallest value of 16 bits each. Where keys and values have
    low rank, the cache holds the latent vector from which both are computed, once.
    """
    cached = dict(_cache_entry(weight, plan[c.name]) for c in parts.components for weight in c.weights if weight.cached)
    if all(scheme is None or (scheme.cache == NOT_ROUNDED and scheme.method != QSVD) for scheme, _ in cached):
        return None
    total = 0
    for (scheme, _), length in cached.items():
        if scheme is None or scheme.cache == NOT_ROUNDED:
            total += parts.native_bits * length
        else:
            total += scheme.cache * length + 32 * math.ceil(length / int(scheme[CACHE_GROUP] or 1))
    return total


def _cache_entry(weight: Weight, scheme: Scheme | None) -> tuple[tuple[Scheme | None, str | None], int]:
    """A key and the length of what attention caches for a weight; weights with a common latent vector share a key."""
    if scheme is not None and scheme.method == QSVD and weight.is_qkv:
        return (scheme, weight.shares_input), latent_rank(scheme, weight.cols)
    return (scheme, weight.name), weight.rows


def uniform_sizes(parts: ComponentMap, schemes: Iterable[Scheme]) -> dict[int, Size]:
    """The size of the uniform plan of each scheme, by its bit width."""
    return {scheme.bits: size(parts, Plan.uniform(parts, scheme)) for scheme in schemes}
