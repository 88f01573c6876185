"""Size: the counted bits of a plan, as a value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NotRequired, TypedDict


class SizeJson(TypedDict):
    """What a file stores of a size."""

    bytes: int
    bpw: float
    bpw_codes: float
    format: NotRequired[str]
    cache_bits: NotRequired[int]


@dataclass(frozen=True)
class Size:
    """The size of a plan: `bpw` counts everything that is stored, `bpw_codes` only codes, as papers do.

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
    # of keys and values per token, where a plan rounds some; not part of `bits`, since no file holds a cache
    cache_bits: int | None = None

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
        return "all stored" if self.format is None else f"all stored in {self.format} files"

    def to_json(self) -> SizeJson:
        """Bytes and bits per weight as JSON values."""
        content: SizeJson = {"bytes": self.bytes, "bpw": self.bpw, "bpw_codes": self.bpw_codes}
        if self.cache_bits is not None:
            content["cache_bits"] = self.cache_bits
        return content if self.format is None else {**content, "format": self.format}
