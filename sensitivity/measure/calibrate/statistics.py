"""Statistics: what calibration found out about each layer's inputs, or how to find it out along the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from sensitivity.measure.calibrate.absorbers import Absorber
from sensitivity.measure.calibrate.blockwise import Done
from sensitivity.measure.calibrate.cache import Cache
from sensitivity.quantize.curvature import Curvature
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.plan import Scheme, Setting

PATHS = ("float", "exposed")


def known_path(path: str) -> None:
    if path not in PATHS:
        raise unknown("calibration path", path, PATHS)


class Gather(Protocol):
    """The curvature of some weights, by `reads`; `done` are the weights that the model holds quantized by then."""

    def __call__(self, weights: Sequence[Weight], done: Done | None = None, /) -> Mapping[str, Curvature]: ...


@dataclass(frozen=True)
class Statistics:
    """The curvature of layers by input, and on which data, how, it was found: facts that schemes write down."""

    facts: Mapping[str, Setting]  # calibration, examples, seed, data and path
    gather: Gather
    trace: Callable[[], Mapping[str, Absorber]] = field(default=dict)  # what scales can be folded into, by input
    cache: Cache | None = None  # of quantized weights

    @cached_property
    def absorbers(self) -> Mapping[str, Absorber]:
        """Found when first asked for, by one forward pass."""
        return self.trace()

    @property
    def exposed(self) -> bool:
        """Whether inputs passed the layers that were quantized before: then they differ from plan to plan."""
        return self.facts["path"] == "exposed"

    def fits(self, scheme: Scheme) -> None:
        """A scheme names the data that it was calibrated on, or two trials with one key could differ."""
        for fact, value in self.facts.items():
            if scheme.get(fact) != value:
                raise UserError(
                    f"{scheme.method} was to be calibrated with {fact} = {scheme.get(fact)!r}, and the statistics have "
                    f"{value!r}; make schemes with calibration=statistics.facts"
                )
