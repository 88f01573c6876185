"""Predicts the score of any plan: damage grows as bits fall, adds up over components and is read off a curve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import norm

from sensitivity.analysis.surrogate.damage import DamageModel
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme

Floats = np.ndarray
Choice = Scheme | None
DRAWS = 128
PAIRS = 6  # interaction terms at most
WORTH = 0.03  # by which share a term must lower the residuals to stay


@dataclass(frozen=True)
class Space:
    """What each component may be: native first, then schemes by falling bits, family after family."""

    names: tuple[str, ...]
    choices: tuple[tuple[Choice, ...], ...]

    @classmethod
    def of(cls, plans: Sequence[Plan]) -> Space:
        """All schemes that these plans use, and native."""
        if not plans:
            raise UserError("no plan to learn from")
        names = tuple(name for name, _ in plans[0].schemes)
        seen: list[set[Choice]] = [{plan[name] for plan in plans} | {None} for name in names]
        return cls(names, tuple(tuple(sorted(found, key=_order)) for found in seen))

    def encode(self, plans: Sequence[Plan]) -> Floats:
        """Plans as rows of positions in `choices`."""
        place = [{choice: i for i, choice in enumerate(options)} for options in self.choices]
        rows = [[at[plan[name]] for name, at in zip(self.names, place, strict=True)] for plan in plans]
        return np.array(rows, dtype=int).reshape(len(plans), len(self.names))

    def decode(self, row: Sequence[int] | Floats) -> Plan:
        chosen = (options[int(i)] for options, i in zip(self.choices, row, strict=True))
        return Plan(tuple(zip(self.names, chosen, strict=True)))


def _family(scheme: Scheme) -> str:
    return f"{scheme.method}/{scheme.group}/{scheme.symmetric}/{scheme.settings}"


def _order(choice: Choice) -> tuple[str, int]:
    return ("", 0) if choice is None else (_family(choice), -choice.bits)


@dataclass(frozen=True)
class Surrogate:
    """score = floor + (top - floor) * exp(-eta ** power), eta = the sum of damages, plus products of pairs of them.

    Within a family of schemes a component's damage rises step by step as bits fall; steps are positive because their
    logarithms are fitted. The prior says that a step doubles or trebles per bit and that components and steps differ
    by some factors; the data soon overrule it. `theta` is the fit, `root` a square root of its covariance.
    """

    space: Space
    pairs: tuple[tuple[int, int], ...]
    theta: Floats
    root: Floats
    sigma: float  # of one reading, misfit included
    layout: DamageModel = field(repr=False)

    def damages(self, theta: Floats | None = None) -> list[Floats]:
        """Per component the damage of each of its choices."""
        return self.layout.damages(self.theta if theta is None else theta)

    def gammas(self, theta: Floats | None = None) -> Floats:
        theta = self.theta if theta is None else theta
        return np.asarray(theta[len(theta) - len(self.pairs) :])

    def predict(self, index: Floats, theta: Floats | None = None) -> Floats:
        return self.layout.predict(self.theta if theta is None else theta, index)

    def sample(self, draw: np.random.Generator, times: int = DRAWS) -> Floats:
        """Plausible parameters: draws from the fit's normal approximation."""
        return np.asarray(self.theta + draw.standard_normal((times, self.root.shape[1])) @ self.root.T)

    def draws(self, index: Floats) -> Floats:
        """Scores of plans under each plausible parameter vector, draws x plans; the same draws at every call."""
        return np.stack([self.predict(index, theta) for theta in self.sample(np.random.default_rng(0))])

    @property
    def power(self) -> float:
        return self.layout.power(self.theta)

    def at_damage(self, eta: Floats) -> Floats:
        return self.layout.curve(self.theta, eta)[0]

    def eta_at(self, score: float) -> float:
        """The damage at which the score falls to a given value; negative when it never is that high."""
        return self.layout.eta_at(self.theta, score)


def _layout(space: Space, pairs: tuple[tuple[int, int], ...]) -> DamageModel:
    parents: list[tuple[int, ...]] = []
    bits, above = [], []
    for options in space.choices:
        schemes = [option for option in options if option is not None]
        before: list[int] = []
        for i, scheme in enumerate(schemes):
            before.append(i - 1 if i and _family(schemes[i - 1]) == _family(scheme) else -1)
        parents.append(tuple(before))
        bits.append(tuple(scheme.bits for scheme in schemes))
        above.append(tuple(schemes[p].bits if p >= 0 else 16 for p in before))
    return DamageModel(tuple(len(b) for b in bits), tuple(parents), tuple(bits), tuple(above), pairs)


def learn(
    space: Space,
    index: Floats,
    score: Floats,
    full: float | None = None,
    noise: float | None = None,
    pairs: bool = True,
) -> Surrogate:
    """Fit the model to readings; interaction terms join only where the data speak for them."""
    unit = float(np.max(np.abs(score))) or 1.0
    readings = score / unit
    top = (float(np.quantile(score, 0.9)) if full is None else full) / unit
    least = max((noise or 0.0) / unit, 1e-3)
    found = _fit(space, index, readings, (), top, least)
    while pairs and len(found.pairs) < PAIRS and (pair := _missing_pair(found, index, readings)):
        better = _fit(space, index, readings, (*found.pairs, pair), top, least, found)
        if better.sigma > (1 - WORTH) * found.sigma or better.gammas().min() < 0:
            break
        found = better
    theta, root = found.theta.copy(), found.root.copy()
    theta[:2] *= unit
    root[:2] *= unit
    return Surrogate(space, found.pairs, theta, root, found.sigma * unit, found.layout)


def _fit(
    space: Space,
    index: Floats,
    score: Floats,
    pairs: tuple[tuple[int, int], ...],
    top: float,
    least: float,
    before: Surrogate | None = None,
) -> Surrogate:
    layout = _layout(space, pairs)
    parts = len(space.names)
    center = np.concatenate([[top, 0.0, 0.0, -0.5, 0.0], np.zeros(parts + layout.steps + len(pairs))])
    spread = np.concatenate(
        [[0.1, 0.3, 0.5, 2.0, 0.7], np.full(parts, 1.5), np.full(layout.steps, 1.0), np.full(len(pairs), 1.0)]
    )
    theta = center if before is None else np.append(before.theta, 0.0)
    sigma = max(least, 0.05) if before is None else before.sigma
    for _ in range(3 if before is None else 1):  # the noise and the fit depend on each other
        scale = sigma

        def residuals(t: Floats, scale: float = scale) -> Floats:
            return np.concatenate([(layout.predict(t, index) - score) / scale, (t - center) / spread])

        def slopes(t: Floats, scale: float = scale) -> Floats:
            return np.concatenate([layout.jacobian(t, index) / scale, np.diag(1 / spread)])

        found = least_squares(
            residuals, theta, jac=slopes, method="lm", max_nfev=100 if before is None else 30, xtol=1e-6, ftol=1e-6
        )
        theta = found.x
        data = found.jac[: len(score)]
        inverse = np.linalg.inv(found.jac.T @ found.jac)
        used = float(np.trace(data @ inverse @ data.T))  # how many parameters the data really determined
        misfit = float(np.sum((layout.predict(theta, index) - score) ** 2))
        sigma = max(least, math.sqrt(misfit / max(len(score) - used, 1.0)))
        if abs(sigma - scale) < 0.02 * scale:
            break
    values, vectors = np.linalg.eigh(inverse)
    root = vectors * np.sqrt(np.maximum(values, 0))
    return Surrogate(space, pairs, theta, root, sigma, layout)


def _missing_pair(model: Surrogate, index: Floats, score: Floats) -> tuple[int, int] | None:
    """The pair whose product of damages best explains what is left, if that is beyond chance (1 % over all pairs).

    Only pairs that hurt each other more than the sum: a negative product would soon promise that two ruined parts
    make a good model, and damage that adds up to less than its sum is what the power of the curve is for.
    """
    layout, theta = model.layout, model.theta
    damages = np.column_stack([d[index[:, c]] for c, d in enumerate(model.damages())])
    by_eta = layout.curve(theta, layout.eta(theta, damages))[2]
    left = (score - layout.predict(theta, index)) / model.sigma
    jac = layout.jacobian(theta, index) / model.sigma
    candidates = [pair for pair in itertools.combinations(range(len(layout.sizes)), 2) if pair not in model.pairs]
    if not candidates or len(score) < layout.length / 2:
        return None
    normal = model.root @ model.root.T
    best, most = None, float(norm.isf(0.01 / len(candidates)))
    for a, b in candidates:
        column = by_eta * damages[:, a] * damages[:, b] / model.sigma
        spare = column - jac @ (normal @ (jac.T @ column))  # what the other parameters cannot imitate
        weight = float(column @ spare)
        strength = float(spare @ left) / math.sqrt(weight) if weight > 1e-6 else 0.0
        if strength > most:
            best, most = (a, b), strength
    return best
