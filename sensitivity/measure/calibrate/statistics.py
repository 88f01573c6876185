"""Statistics of each layer's inputs from calibration, collected in advance or when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from sensitivity.measure.calibrate.absorbers import Absorber
from sensitivity.measure.calibrate.blockwise import Installed
from sensitivity.measure.calibrate.cache import Cache
from sensitivity.quantize.curvature import Curvature
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.plan import Scheme, Setting

PATHS = ("float", "exposed")


def check_path(path: str) -> None:
    """Raise an error for an unknown calibration path."""
    if path not in PATHS:
        raise unknown("calibration path", path, PATHS)


class Gather(Protocol):
    """The curvature of some weights by input (`reads`); `installed` lists the quantized weights in the model."""

    def __call__(self, weights: Sequence[Weight], installed: Installed | None = None, /) -> Mapping[str, Curvature]: ...


@dataclass(frozen=True)
class Statistics:
    """The curvature of each layer's input, and the facts of its calibration, which schemes record."""

    facts: Mapping[str, Setting]  # calibration, examples, seed, data and path
    gather: Gather
    find_absorbers: Callable[[], Mapping[str, Absorber]] = field(
        default=dict
    )  # finds what scales can be folded into, by input
    cache: Cache | None = None  # of quantized weights

    @cached_property
    def absorbers(self) -> Mapping[str, Absorber]:
        """What each input's scales can be folded into, found by one forward pass when first asked for."""
        return self.find_absorbers()

    @property
    def exposed(self) -> bool:
        """Whether inputs have passed the layers quantized before; then they differ from plan to plan."""
        return self.facts["path"] == "exposed"

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise an error unless the scheme names this calibration data: two trials with one key could differ."""
        for fact, value in self.facts.items():
            if scheme.get(fact) != value:
                raise UserError(
                    f"{scheme.method} asks for calibration with {fact} = {scheme.get(fact)!r}, and these statistics "
                    f"have {value!r}; make schemes with calibration=statistics.facts"
                )
