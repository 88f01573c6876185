"""Space: the choices of each component, and how far apart they are in octaves of bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import NOT_ROUNDED, Plan, Scheme

Floats = np.ndarray
Choice = Scheme | None
Expected = Mapping[str, Mapping[Scheme, float]]  # component -> scheme -> damage, of which only ratios count
FAMILY_DISTANCE = 0.5  # octaves between a family of schemes and full precision, added to those of bits


@dataclass(frozen=True)
class Space:
    """The choices of each component: native first, then its schemes, family after family, each by falling bits."""

    names: tuple[str, ...]
    choices: tuple[tuple[Choice, ...], ...]

    @classmethod
    def of(cls, plans: Sequence[Plan], expected: Expected | None = None) -> Space:
        """The space of native and of all schemes that these plans use or that have an expected damage."""
        if not plans:
            raise UserError("no plan to learn from")
        names = tuple(name for name, _ in plans[0].schemes)
        seen: list[set[Choice]] = [
            {plan[name] for plan in plans} | set((expected or {}).get(name, ())) | {None} for name in names
        ]
        return cls(names, tuple(tuple(sorted(used, key=_order)) for used in seen))

    def uniform(self) -> list[list[int]]:
        """Rows of the uniform plans, widest first; components without a cache have the scheme without cache bits."""
        schemes = dict.fromkeys(choice for options in self.choices for choice in options if choice is not None)
        rows = [[_place(options, scheme) for options in self.choices] for scheme in sorted(schemes, key=_narrowness)]
        return [[place for place in row if place is not None] for row in rows if None not in row and any(row)]

    def encode(self, plans: Sequence[Plan]) -> Floats:
        """Plans as rows of positions among the choices of each component."""
        place = [{choice: i for i, choice in enumerate(options)} for options in self.choices]
        rows = [[at[plan[name]] for name, at in zip(self.names, place, strict=True)] for plan in plans]
        return np.array(rows, dtype=int).reshape(len(plans), len(self.names))

    def decode(self, row: Sequence[int] | Floats) -> Plan:
        """The plan of one row of positions."""
        schemes = (options[int(i)] for options, i in zip(self.choices, row, strict=True))
        return Plan(tuple(zip(self.names, schemes, strict=True)))

    def distances(self) -> tuple[Floats, ...]:
        """Per component, the distances between its choices, in octaves of bits; full precision has 16 bits."""
        return tuple(
            np.array([[_distance(one, other) for other in options] for one in options]) for options in self.choices
        )


def summed_over_axes(expected: Expected, axes: Sequence[Sequence[str]], names: Sequence[str]) -> Expected:
    """The expected damage of each axis: the sum over its components, for each scheme that all of them have."""
    found = {}
    for name, group in zip(names, axes, strict=True):
        shared = set.intersection(*(set(expected.get(component, {})) for component in group))
        found[name] = {scheme: sum(expected[component][scheme] for component in group) for scheme in shared}
    return found


def family(scheme: Scheme) -> str:
    """What schemes must have in common for fewer bits to mean more damage: everything but the bits."""
    rounded = "" if scheme.activations == scheme.cache == NOT_ROUNDED else f"/{scheme.activations}/{scheme.cache}"
    return f"{scheme.method}/{scheme.group}/{scheme.symmetric}/{scheme.settings}{rounded}"


def _order(choice: Choice) -> tuple[str, int]:
    """Sort key of choices: native, then family after family, each by falling bits."""
    return ("", 0) if choice is None else (family(choice), -choice.bits)


def _narrowness(scheme: Scheme) -> tuple[int, int, int]:
    return -scheme.bits, -scheme.activations, -scheme.cache


def _place(options: Sequence[Choice], scheme: Scheme) -> int | None:
    """The position of a scheme among choices, or of the scheme without cache rounding; None if neither is there."""
    fitting = (choice for choice in (scheme, scheme.without_cache) if choice in options)
    return next((options.index(choice) for choice in fitting), None)


def effective_bits(scheme: Scheme) -> float:
    """The bits of weights alone that, by the prior, do as much damage as a scheme's weights, activations and cache.

    The prior's damage of b bits is exp(3 - b), so weights and activations of 4 bits do as much as weights of 3.3.
    """
    rounded = [width for width in (scheme.activations, scheme.cache) if width != NOT_ROUNDED]
    if not rounded:
        return scheme.bits
    return -math.log(sum(math.exp(-width) for width in (scheme.bits, *rounded)))


def _distance(one: Choice, other: Choice) -> float:
    """How many octaves of bits lie between two choices; schemes of different families are never the same."""
    octaves, labels = (
        [math.log2(max(effective_bits(choice), 0.5)) if choice else 4.0 for choice in (one, other)],
        [family(choice) if choice else None for choice in (one, other)],
    )
    # counted once per family: the way from one family to another leads through full precision
    families = 0 if labels[0] == labels[1] else sum(label is not None for label in labels)
    return abs(octaves[0] - octaves[1]) + FAMILY_DISTANCE * families
