"""Damages that other studies measured, as expectations for one with another method, task, size or model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sensitivity.analysis.observations import observations_of
from sensitivity.analysis.surrogate.space import Space, family, width
from sensitivity.analysis.surrogate.surrogate import fit_surrogate
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Scheme
from sensitivity.study.study import Study

Curve = tuple[tuple[float, ...], tuple[float, ...]]  # bits, rising, and the logarithm of the damage at each
FEWEST = 5  # plans from which damages are learned
FALL = 1.0  # how much the logarithm of a damage falls with a bit, where only one width was measured
LEAST = 1e-8  # least damage: a smaller one counts as this, since its logarithm is taken


def transferred(
    study: Study, parts: ComponentMap, schemes: Sequence[Scheme], task: str | None = None
) -> dict[str, dict[Scheme, float]]:
    """The damage of each scheme to each component of `parts`, as a study predicts it; only ratios mean anything.

    Components are those of the same name, else those that they contain or are part of, else those of the same part of
    the model. Schemes are those of the same method, else all, at the same width; between widths, the logarithm of the
    damage is linear.
    """
    curves = measured_damages(study, task)
    owners = {name: _related(name, list(curves)) for name in parts.names}
    for name, found in owners.items():
        if not found:
            raise UserError(
                f"{study.path} says nothing about {name}: it has {', '.join(curves)}; "
                "choose a prior with the same parts"
            )
    # a component that several of ours belong to shares its damage among them
    shares = {source: sum(source in found for found in owners.values()) for source in curves}
    return {
        name: {
            scheme: sum(_at(curves[source], scheme) / shares[source] for source in found) for scheme in schemes
        }
        for name, found in owners.items()
    }  # fmt: skip


def measured_damages(study: Study, task: str | None = None) -> dict[str, dict[str, Curve]]:
    """Per component and family of schemes, the damage at each width that a study measured, by its surrogate."""
    observations = observations_of(study, task)
    if len(set(observations.keys)) < FEWEST:
        raise UserError(
            f"{study.path} has measured {len(set(observations.keys))} plans, too few for a prior; "
            f"at least {FEWEST} are needed"
        )
    space = Space.of(observations.plans)
    index = space.encode(observations.plans)
    model = fit_surrogate(space, index, observations.score, observations.full, observations.noises, corrected=False)
    found: dict[str, dict[str, Curve]] = {}
    for name, options, damages in zip(space.names, space.choices, model.damages(), strict=True):
        curves: dict[str, dict[float, float]] = {}
        for option, damage in zip(options[1:], damages[1:], strict=True):
            assert option is not None
            curves.setdefault(family(option), {})[width(option)] = math.log(max(float(damage), LEAST))
        found[name] = {key: _curve(points) for key, points in curves.items()}
    return {name: curves for name, curves in found.items() if curves}


def _curve(points: Mapping[float, float]) -> Curve:
    bits = tuple(sorted(points))
    return bits, tuple(points[bit] for bit in bits)


def _related(name: str, sources: Sequence[str]) -> list[str]:
    """The other study's components of this name; else those inside it, else those around it, else those of its part."""
    words, others = name.split("."), {source: source.split(".") for source in sources}
    same = [source for source, other in others.items() if other == words]
    inside = [source for source, other in others.items() if other[: len(words)] == words]
    around = [source for source, other in others.items() if words[: len(other)] == other]
    return same or inside or around or [source for source, other in others.items() if other[0] == words[0]]


def _at(curves: Mapping[str, Curve], scheme: Scheme) -> float:
    """The damage of a scheme by the curve of its own family, else by the mean of all."""
    own = [curve for key, curve in curves.items() if key == family(scheme)]
    own = own or [curve for key, curve in curves.items() if key.startswith(f"{scheme.method}/")]
    return math.exp(float(np.mean([_interpolated(curve, width(scheme)) for curve in own or list(curves.values())])))


def _interpolated(curve: Curve, bits: float) -> float:
    """The logarithm of the damage at a width; beyond the measured widths, extrapolated with their mean slope."""
    known, logs = curve
    if known[0] <= bits <= known[-1]:
        return float(np.interp(bits, known, logs))
    fall = (logs[0] - logs[-1]) / (known[-1] - known[0]) if len(known) > 1 else FALL
    nearest = 0 if bits < known[0] else -1
    return logs[nearest] - max(fall, 0.0) * (bits - known[nearest])
