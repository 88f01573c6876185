"""Fits the surrogate: scores of plans predicted from damage that grows as bits fall and adds up over components."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import norm

from sensitivity.analysis.surrogate.damage import DamageModel
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import NOT_ROUNDED, Plan, Scheme

Floats = np.ndarray
Choice = Scheme | None
Expected = Mapping[str, Mapping[Scheme, float]]  # component -> scheme -> damage, of which only ratios count
DRAWS = 128  # parameter vectors that are drawn for an interval
PAIRS = 6  # most interaction terms
LITTLE = 1e-5  # least expected step, as a share of the largest
PRIOR = (1.5, 1.0)  # spread of the logarithms of components and of steps around the formula's expectation
TRUST = 0.8  # expectations are dropped if the error without them is below this share of that with them
TOLD = (0.8, 0.5)  # the same around damages that were expected of this model
WORTH = 0.03  # an interaction term stays if it lowers the residual error by at least this share


@dataclass(frozen=True)
class Space:
    """The choices of each component: native first, then its schemes, family after family, each by falling bits."""

    names: tuple[str, ...]
    choices: tuple[tuple[Choice, ...], ...]

    @classmethod
    def of(cls, plans: Sequence[Plan], expected: Expected | None = None) -> Space:
        """The space of all schemes that these plans use or of which something is expected, and native."""
        if not plans:
            raise UserError("no plan to learn from")
        names = tuple(name for name, _ in plans[0].schemes)
        seen: list[set[Choice]] = [
            {plan[name] for plan in plans} | set((expected or {}).get(name, ())) | {None} for name in names
        ]
        return cls(names, tuple(tuple(sorted(used, key=_order)) for used in seen))

    def uniform(self) -> list[list[int]]:
        """Rows of the plans that give every component the same scheme, as far as it has a cache; widest first."""
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


def _family(scheme: Scheme) -> str:
    """What schemes must have in common for fewer bits to mean more damage: everything but the bits."""
    rounded = "" if scheme.activations == scheme.cache == NOT_ROUNDED else f"/{scheme.activations}/{scheme.cache}"
    return f"{scheme.method}/{scheme.group}/{scheme.symmetric}/{scheme.settings}{rounded}"


def _order(choice: Choice) -> tuple[str, int]:
    return ("", 0) if choice is None else (_family(choice), -choice.bits)


def _narrowness(scheme: Scheme) -> tuple[int, int, int]:
    return -scheme.bits, -scheme.activations, -scheme.cache


def _place(options: Sequence[Choice], scheme: Scheme) -> int | None:
    """The place of a scheme among the choices of a component, which may have no cache; None if it is not there."""
    fitting = (choice for choice in (scheme, scheme.without_cache) if choice in options)
    return next((options.index(choice) for choice in fitting), None)


def _width(scheme: Scheme) -> float:
    """The bits of a scheme in the prior of its damage, where damage of weights, activations and cache adds up.

    The prior's damage of b bits is exp(3 - b), so widths of 4 and 4 bits together do as much as 3.3 alone.
    """
    rounded = [width for width in (scheme.activations, scheme.cache) if width != NOT_ROUNDED]
    if not rounded:
        return scheme.bits
    return -math.log(sum(math.exp(-width) for width in (scheme.bits, *rounded)))


@dataclass(frozen=True)
class Surrogate:
    """A fitted surrogate: score = floor + (top - floor) * exp(-eta ** power), where eta is the plan's total damage.

    Within a family of schemes a component's damage rises step by step as bits fall. Steps are fitted as logarithms,
    hence positive: fewer bits never predict a better score. A normal prior says that damage doubles or trebles with
    each bit less, and that components and steps differ by some factors; the data soon outweigh it. `theta` holds the
    fitted parameters, `root` a square root of their covariance.
    """

    space: Space
    pairs: tuple[tuple[int, int], ...]
    theta: Floats
    root: Floats
    sigma: float  # standard deviation of one measured score around its prediction: noise and misfit
    formula: DamageModel = field(repr=False)

    def damages(self, theta: Floats | None = None) -> list[Floats]:
        """Per component, the damage of each of its choices."""
        return self.formula.damages(self.theta if theta is None else theta)

    def gammas(self, theta: Floats | None = None) -> Floats:
        """Strength of each interacting pair."""
        theta = self.theta if theta is None else theta
        return np.asarray(theta[len(theta) - len(self.pairs) :])

    def predict(self, index: Floats, theta: Floats | None = None) -> Floats:
        """Predicted scores of plans, given as rows of positions."""
        return self.formula.predict(self.theta if theta is None else theta, index)

    def sample(self, draw: np.random.Generator, times: int = DRAWS) -> Floats:
        """Parameter vectors drawn from the normal distribution with the fit's mean and covariance."""
        return np.asarray(self.theta + draw.standard_normal((times, self.root.shape[1])) @ self.root.T)

    def draws(self, index: Floats) -> Floats:
        """Predicted scores under each of DRAWS parameter vectors, draws x plans; the same vectors at every call."""
        return np.stack([self.predict(index, theta) for theta in self.sample(np.random.default_rng(0))])

    @property
    def power(self) -> float:
        """Exponent of the curve."""
        return self.formula.power(self.theta)

    def at_damage(self, eta: Floats) -> Floats:
        """Score at a total damage."""
        return self.formula.curve(self.theta, eta)[0]

    def eta_at(self, score: float) -> float:
        """The total damage at which the score falls to a given value; negative where full precision scores less."""
        return self.formula.eta_at(self.theta, score)


def _formula(space: Space, pairs: tuple[tuple[int, int], ...], expected: Expected | None = None) -> DamageModel:
    """The parameters that a space of choices and interacting pairs needs."""
    parents: list[tuple[int, ...]] = []
    bits, above = [], []
    for options in space.choices:
        schemes = [option for option in options if option is not None]
        before: list[int] = []
        for i, scheme in enumerate(schemes):
            # the first scheme of a family builds on native (-1), each other on the next wider one of its family
            before.append(i - 1 if i and _family(schemes[i - 1]) == _family(scheme) else -1)
        parents.append(tuple(before))
        bits.append(tuple(_width(scheme) for scheme in schemes))
        above.append(tuple(_width(schemes[p]) if p >= 0 else 16 for p in before))
    plain = DamageModel(tuple(len(b) for b in bits), tuple(parents), tuple(bits), tuple(above), pairs)
    return plain if expected is None else replace(plain, expected=_expected_steps(space, plain, expected))


def _expected_steps(space: Space, plain: DamageModel, expected: Expected) -> tuple[float, ...]:
    """The logarithm of each step's expected damage, at the mean level of the formula's own; that where none is given.

    A narrower scheme that is expected to do no more damage than the next wider one gets a small step all the same.
    """
    steps = np.full(plain.steps, np.nan)
    for c, (name, options) in enumerate(zip(space.names, space.choices, strict=True)):
        damages = [expected.get(name, {}).get(option, np.nan) if option else 0.0 for option in options]
        for i, parent in enumerate(plain.family_start[c]):
            steps[plain.first[c] + i] = damages[i + 1] - (damages[parent + 1] if parent >= 0 else 0.0)
    if not (steps > 0).any():
        return tuple(plain.base)
    known = np.isfinite(steps)
    logs = np.log(np.maximum(steps, LITTLE * np.nanmax(steps)), where=known, out=np.zeros_like(steps))
    logs[known] += plain.base[known].mean() - logs[known].mean()
    return tuple(np.where(known, logs, plain.base))


def fit_surrogate(
    space: Space,
    index: Floats,
    score: Floats,
    full: float | None = None,
    noise: float | None = None,
    pairs: bool = True,
    expected: Expected | None = None,
) -> Surrogate:
    """Fit the surrogate to measured scores; interaction terms are added one by one while they lower the error.

    `expected`: damages that are known before any score, up to a factor. Scores correct them, and where a fit without
    them is clearly closer to the scores, they are wrong and not used.
    """
    if expected is not None:
        told, plain = (_fitted(space, index, score, full, noise, pairs, prior) for prior in (expected, None))
        return plain if plain.sigma < TRUST * told.sigma else told
    return _fitted(space, index, score, full, noise, pairs, None)


def _fitted(
    space: Space,
    index: Floats,
    score: Floats,
    full: float | None,
    noise: float | None,
    pairs: bool,
    expected: Expected | None,
) -> Surrogate:
    """The surrogate with given expectations, with as many interaction terms as are worth it."""
    unit = float(np.max(np.abs(score))) or 1.0  # the prior is made for scores of about 1: percent are scaled
    scaled = score / unit
    top = (float(np.quantile(score, 0.9)) if full is None else full) / unit
    least = max((noise or 0.0) / unit, 1e-3)  # sigma's lower limit: few trials are fitted without any residual
    model = _fit(space, index, scaled, (), top, least, None, expected)
    while pairs and len(model.pairs) < PAIRS and (pair := _missing_pair(model, index, scaled)):
        better = _fit(space, index, scaled, (*model.pairs, pair), top, least, model, expected)
        if better.sigma > (1 - WORTH) * model.sigma or better.gammas().min() < 0:
            break
        model = better
    theta, root = model.theta.copy(), model.root.copy()
    theta[:2] *= unit  # top and floor alone are in units of the score
    root[:2] *= unit
    return Surrogate(space, model.pairs, theta, root, model.sigma * unit, model.formula)


def _fit(
    space: Space,
    index: Floats,
    score: Floats,
    pairs: tuple[tuple[int, int], ...],
    top: float,
    least: float,
    before: Surrogate | None = None,
    expected: Expected | None = None,
) -> Surrogate:
    """Maximum a posteriori fit by Levenberg and Marquardt: data and prior are residuals of one least-squares problem.

    The prior's residuals also give that algorithm what it demands: at least as many residuals as parameters.
    """
    formula = _formula(space, pairs, expected)
    parts, (of_component, of_step) = len(space.names), PRIOR if expected is None else TOLD
    # mean and spread of the prior, in the order of theta: top, floor, log power, level, slope; components, steps, pairs
    center = np.concatenate([[top, 0.0, 0.0, -0.5, 0.0], np.zeros(parts + formula.steps + len(pairs))])
    spread = np.concatenate(
        [[0.1, 0.3, 0.5, 2.0, 0.7], np.full(parts, of_component), np.full(formula.steps, of_step), np.ones(len(pairs))]
    )
    # gammas stand last in theta: a fit with one pair less is a start for this one once a zero is appended
    theta = center if before is None else np.append(before.theta, 0.0)
    sigma = max(least, 0.05) if before is None else before.sigma
    for _ in range(3 if before is None else 1):  # sigma weighs the data against the prior, and the fit gives sigma
        scale = sigma

        def residuals(t: Floats, scale: float = scale) -> Floats:
            return np.concatenate([(formula.predict(t, index) - score) / scale, (t - center) / spread])

        def slopes(t: Floats, scale: float = scale) -> Floats:
            return np.concatenate([formula.jacobian(t, index) / scale, np.diag(1 / spread)])

        solution = least_squares(
            residuals, theta, jac=slopes, method="lm", max_nfev=100 if before is None else 30, xtol=1e-6, ftol=1e-6
        )
        theta = solution.x
        data = solution.jac[: len(score)]
        inverse = np.linalg.inv(solution.jac.T @ solution.jac)
        used = float(np.trace(data @ inverse @ data.T))  # effective parameters: those that data, not prior, determine
        misfit = float(np.sum((formula.predict(theta, index) - score) ** 2))
        sigma = max(least, math.sqrt(misfit / max(len(score) - used, 1.0)))
        if abs(sigma - scale) < 0.02 * scale:
            break
    # not Cholesky's root: rounding can make a nearly singular covariance slightly indefinite
    values, vectors = np.linalg.eigh(inverse)
    root = vectors * np.sqrt(np.maximum(values, 0))
    return Surrogate(space, pairs, theta, root, sigma, formula)


def _missing_pair(model: Surrogate, index: Floats, score: Floats) -> tuple[int, int] | None:
    """The pair whose interaction best explains the residuals, where a score test at 1 % over all pairs supports it.

    Only pairs that do more damage together than the sum of both: with a negative gamma, two ruined components could
    be predicted to make a good model, and damage below the sum is already described by the power of the curve.
    """
    formula, theta = model.formula, model.theta
    damages = np.column_stack([d[index[:, c]] for c, d in enumerate(model.damages())])
    by_eta = formula.curve(theta, formula.eta(theta, damages))[2]
    left = (score - formula.predict(theta, index)) / model.sigma
    jac = formula.jacobian(theta, index) / model.sigma
    candidates = [pair for pair in itertools.combinations(range(len(formula.sizes)), 2) if pair not in model.pairs]
    # with fewer trials than half the parameters, nearly every pair explains the residuals
    if not candidates or len(score) < formula.length / 2:
        return None
    normal = model.root @ model.root.T
    best, most = None, float(norm.isf(0.01 / len(candidates)))
    for a, b in candidates:
        column = by_eta * damages[:, a] * damages[:, b] / model.sigma  # the prediction's derivative by this gamma
        spare = column - jac @ (normal @ (jac.T @ column))  # what no change of the other parameters explains as well
        weight = float(column @ spare)
        strength = float(spare @ left) / math.sqrt(weight) if weight > 1e-6 else 0.0
        if strength > most:
            best, most = (a, b), strength
    return best
