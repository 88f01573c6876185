"""Until: the conditions under which a sweep stops before every plan has seen every example."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from sensitivity.spec.errors import UserError
from sensitivity.study.racing import uncertainty
from sensitivity.study.study import Study

UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
MAX_NUMBER = 1e6  # largest number that --until takes, in any unit
CONDITIONS = "complete, a time such as 10min (s, min, h), or error<0.5%"


@dataclass(frozen=True)
class Until:
    """When a sweep stops before every plan has seen every example: after a time, or at a small enough error."""

    seconds: float = math.inf
    error: float = 0.0  # half the 95 % interval of every frontier plan's difference to full precision
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Until:
        """From words such as `complete`, `10min` and `error<0.5%`; the first condition that is met ends the sweep."""
        seconds, error = math.inf, 0.0
        for word in words:
            plain = word.replace(" ", "")
            if parsed := re.fullmatch(r"([0-9.]+)(s|min|h)", plain):
                seconds = min(seconds, _number(parsed[1], word) * UNITS[parsed[2]])
            elif parsed := re.fullmatch(r"error<([0-9.]+)(%?)", plain):
                error = max(error, _number(parsed[1], word) / (100 if parsed[2] else 1))
            elif plain != "complete":
                raise UserError(f"--until {word!r} is none of: {CONDITIONS}")
        return cls(seconds, error)

    @property
    def may_stop_early(self) -> bool:
        """Whether the sweep may stop early, so that later examples go only to plans that still matter."""
        return self.seconds < math.inf or self.error > 0

    @property
    def out_of_time(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() - self.began >= self.seconds

    def reached(self, study: Study) -> bool:
        """Whether a condition is met; an error counts only once every plan has a score."""
        return self.out_of_time or (self.error > 0 and not study.unmeasured() and uncertainty(study) < self.error)


def _number(text: str, word: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MAX_NUMBER:
        raise UserError(f"--until {word!r} needs a number above zero, and at most {MAX_NUMBER:,.0f}")
    return value
