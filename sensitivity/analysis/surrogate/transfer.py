"""Damages that other studies measured, as expectations for one with another method, task, size or model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sensitivity.analysis.observations import observations_of
from sensitivity.analysis.surrogate.fitting import fit_surrogate
from sensitivity.analysis.surrogate.space import Expected, Space, effective_bits, family
from sensitivity.analysis.surrogate.surrogate import Surrogate
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Scheme
from sensitivity.study.counting import count
from sensitivity.study.study import Study

Curve = tuple[tuple[float, ...], tuple[float, ...]]  # bits, rising, and the logarithm of the damage at each
MIN_PLANS = 5  # plans from which damages are learned
FALL = 1.0  # by how much the logarithm of a damage falls with each bit, where only one width was measured
MIN_DAMAGE = 1e-8  # a smaller damage counts as this, so that its logarithm is finite


def transfer_damages(
    damages: Expected, parts: ComponentMap, schemes: Sequence[Scheme], source: Path | str
) -> dict[str, dict[Scheme, float]]:
    """Transfer damages from the components of one model to those of another.

    Components are those of the same name, else those that they contain or are part of, else those of the same part of
    the model. Schemes are those of the same family, else of the same method, else all, at the same width; between
    widths, the logarithm of the damage is linear. `source` is named where a component of `parts` has no counterpart.
    """
    if missing := without_counterpart(damages, parts):
        raise UserError(
            f"{source} says nothing about {missing[0]}: it has {', '.join(damages)}; choose a prior with the same parts"
        )
    curves = {name: _curves(row) for name, row in damages.items()}
    owners = {name: _related(name, list(curves)) for name in parts.names}
    # where several of our components belong to one of theirs, its damage is divided among them
    shares = {source: sum(source in found for found in owners.values()) for source in curves}
    return {
        name: {scheme: sum(_at(curves[source], scheme) / shares[source] for source in found) for scheme in schemes}
        for name, found in owners.items()
    }


def without_counterpart(damages: Expected, parts: ComponentMap) -> list[str]:
    """The components of `parts` that have no counterpart among those with damages."""
    return [name for name in parts.names if not _related(name, list(damages))]


def measured_damages(study: Study, task: str | None = None) -> dict[str, dict[Scheme, float]]:
    """Per component, the damage of each scheme that a study measured, by its surrogate."""
    if not (known := observations_of(study, task)).full > 0:
        raise UserError(
            f"full precision scored nothing on {known.task} in {study.path}: no damage can be learned from it"
        )
    return damages_of(additive_surrogate(study, task))


def additive_surrogate(study: Study, task: str | None = None) -> Surrogate:
    """The surrogate's formula without interactions, fitted to a study: transferred damages are only added up."""
    observations = observations_of(study, task)
    if len(set(observations.keys)) < MIN_PLANS:
        raise UserError(
            f"{study.path} has measured {count(len(set(observations.keys)), 'plan')}, too few to learn damages from; "
            f"at least {MIN_PLANS} are needed"
        )
    space = Space.of(observations.plans)
    index = space.encode(observations.plans)
    return fit_surrogate(
        space, index, observations.score, observations.full, observations.noises, pairs=False, corrected=False
    )


def damages_of(model: Surrogate) -> dict[str, dict[Scheme, float]]:
    """Per component, the damage of each of its schemes; components that were never quantized are left out."""
    return {
        name: {option: float(damage) for option, damage in zip(options, damages, strict=True) if option is not None}
        for name, options, damages in zip(model.space.names, model.space.choices, model.damages(), strict=True)
        if len(options) > 1
    }


def _curves(damages: Mapping[Scheme, float]) -> dict[str, Curve]:
    """For each family of schemes, the logarithm of the damage at each width."""
    points: dict[str, dict[float, float]] = {}
    for scheme, damage in damages.items():
        points.setdefault(family(scheme), {})[effective_bits(scheme)] = math.log(max(damage, MIN_DAMAGE))
    return {key: (tuple(sorted(one)), tuple(one[bits] for bits in sorted(one))) for key, one in points.items()}


def _related(name: str, sources: Sequence[str]) -> list[str]:
    """The other study's components of this name; else those inside it, else those around it, else those of its part."""
    words, others = name.split("."), {source: source.split(".") for source in sources}
    same = [source for source, other in others.items() if other == words]
    inside = [source for source, other in others.items() if other[: len(words)] == words]
    around = [source for source, other in others.items() if words[: len(other)] == other]
    return same or inside or around or [source for source, other in others.items() if other[0] == words[0]]


def _at(curves: Mapping[str, Curve], scheme: Scheme) -> float:
    """The damage of a scheme by the curve of its family, else by the mean of its method's curves, else of all."""
    own = [curve for key, curve in curves.items() if key == family(scheme)]
    own = own or [curve for key, curve in curves.items() if key.startswith(f"{scheme.method}/")]
    bits = effective_bits(scheme)
    return math.exp(float(np.mean([_interpolated(curve, bits) for curve in own or list(curves.values())])))


def _interpolated(curve: Curve, bits: float) -> float:
    """The logarithm of the damage at a width; beyond the measured widths, extrapolated with their mean slope."""
    known, logs = curve
    if known[0] <= bits <= known[-1]:
        return float(np.interp(bits, known, logs))
    fall = (logs[0] - logs[-1]) / (known[-1] - known[0]) if len(known) > 1 else FALL
    nearest = 0 if bits < known[0] else -1
    return logs[nearest] - max(fall, 0.0) * (bits - known[nearest])
