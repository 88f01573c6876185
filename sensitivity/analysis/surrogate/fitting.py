"""Fits the surrogate to measured scores of plans."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import norm

from sensitivity.analysis.surrogate.damage import LEVEL, DamageModel
from sensitivity.analysis.surrogate.misfit import cost_of_fit, fit_misfit
from sensitivity.analysis.surrogate.space import Expected, Space, effective_bits, family
from sensitivity.analysis.surrogate.surrogate import Surrogate
from sensitivity.spec import threads

Floats = np.ndarray
PAIRS = 6  # most interaction terms
MIN_STEP = 1e-5  # least expected step, as a share of the largest
PRIOR = (1.5, 1.0)  # spread of the logarithms of components and of steps around the formula's expectation
EXPECTED_PRIOR = (0.8, 0.5)  # the same, around expected damages of this model
LEVELS = np.arange(-8.0, 1.5, 0.5)  # of damage, at which a fit may start
DOUBT = 1.0  # expected damages are dropped if scores are likelier without them by this much (a logarithm)
MIN_IMPROVEMENT = 0.03  # an interaction term stays if it lowers the residual error by at least this share


def _formula(space: Space, pairs: tuple[tuple[int, int], ...], expected: Expected | None = None) -> DamageModel:
    """The formula for a space of choices and its interacting pairs."""
    parents: list[tuple[int, ...]] = []
    bits, above = [], []
    for options in space.choices:
        schemes = [option for option in options if option is not None]
        before: list[int] = []
        for i, scheme in enumerate(schemes):
            # the first scheme of a family builds on native (-1), each other on the next wider one of its family
            before.append(i - 1 if i and family(schemes[i - 1]) == family(scheme) else -1)
        parents.append(tuple(before))
        bits.append(tuple(effective_bits(scheme) for scheme in schemes))
        above.append(tuple(effective_bits(schemes[p]) if p >= 0 else 16 for p in before))
    plain = DamageModel(tuple(len(b) for b in bits), tuple(parents), tuple(bits), tuple(above), pairs)
    return plain if expected is None else replace(plain, expected=_expected_steps(space, plain, expected))


def _expected_steps(space: Space, plain: DamageModel, expected: Expected) -> tuple[float, ...]:
    """The logarithm of each step's expected damage, shifted to the mean of `base`; `base` itself where none is given.

    A narrower scheme that is expected to do no more damage than the next wider one gets a small step all the same.
    """
    steps = np.full(plain.steps, np.nan)
    for c, (name, options) in enumerate(zip(space.names, space.choices, strict=True)):
        damages = [expected.get(name, {}).get(option, np.nan) if option else 0.0 for option in options]
        for i, parent in enumerate(plain.parents[c]):
            steps[plain.first[c] + i] = damages[i + 1] - (damages[parent + 1] if parent >= 0 else 0.0)
    if not (steps > 0).any():
        return tuple(plain.base)
    known = np.isfinite(steps)
    logs = np.log(np.maximum(steps, MIN_STEP * np.nanmax(steps)), where=known, out=np.zeros_like(steps))
    logs[known] += plain.base[known].mean() - logs[known].mean()
    return tuple(np.where(known, logs, plain.base))


def fit_surrogate(
    space: Space,
    index: Floats,
    score: Floats,
    full: float | None = None,
    noise: float | Floats | None = None,
    pairs: bool = True,
    expected: Expected | None = None,
    corrected: bool = True,
) -> Surrogate:
    """Fit the surrogate to measured scores; interaction terms are added one by one while they lower the error.

    `noise`: one standard deviation for all scores, or one for each; it is estimated where it is not known. `corrected`:
    with a process for what the formula misses, without which intervals are too narrow. `expected`: damages that are
    known before any score, up to a factor. Scores correct them, and where scores are likelier without them, they are
    not used: they may be those of another model.
    """
    unit = float(np.max(np.abs(score))) or 1.0  # the prior is for scores of about 1: others (percent) are scaled
    top = (float(np.quantile(score, 0.9)) if full is None else full) / unit
    known = None if noise is None else np.broadcast_to(np.asarray(noise, dtype=float), score.shape) / unit
    with threads.one_for_linear_algebra():
        found = _fitted(space, index, score / unit, top, known, pairs, expected)
        if expected is not None:
            plain = _fitted(space, index, score / unit, top, known, pairs, None)
            if _cost_of_expecting(found, plain, index, score / unit, top) > DOUBT:
                found, expected = plain, None
        if not corrected:
            return _in_units(found, unit)
        return _corrected(found, index, score, top * unit, None if known is None else known * unit, unit, expected)


def _cost_of_expecting(found: Surrogate, plain: Surrogate, index: Floats, scaled: Floats, top: float) -> float:
    """By how much less likely scores are with what is expected than without (a logarithm), integrated over theta.

    Errors of fits hardly tell: either has more parameters than there are scores, and follows them.
    """
    noise = np.full(len(scaled), min(found.sigma, plain.sigma))
    of_found, of_plain = (
        cost_of_fit(
            one.formula, one.theta, _prior(one.formula, top, expects), one.space.distances(), index, scaled, noise
        )
        for one, expects in ((found, True), (plain, False))
    )
    return of_found - of_plain


def _in_units(model: Surrogate, unit: float) -> Surrogate:
    """The surrogate in units of the score, which matter to top, floor and sigma alone."""
    scale = np.array([unit if i < 2 else 1.0 for i in range(len(model.theta))])
    return replace(model, theta=model.theta * scale, root=model.root * scale[:, None], sigma=model.sigma * unit)


def _corrected(
    model: Surrogate,
    index: Floats,
    score: Floats,
    top: float,
    noise: Floats | None,
    unit: float,
    expected: Expected | None,
) -> Surrogate:
    """The surrogate in units of the score, with a process for what its formula misses."""
    plain = _in_units(model, unit)
    center, spread = _prior(model.formula, top / unit, expected is not None)
    center[:2] *= unit
    spread[:2] *= unit
    misfit = fit_misfit(
        model.formula, plain.theta, (center, spread), model.space.distances(), index, score, noise, plain.sigma
    )
    return replace(plain, root=misfit.root, sigma=misfit.noise, misfit=misfit)


def _fitted(
    space: Space,
    index: Floats,
    scaled: Floats,
    top: float,
    noise: Floats | None,
    pairs: bool,
    expected: Expected | None,
) -> Surrogate:
    """The formula fitted to scores, with those interaction terms that lower the error enough."""
    # sigma's lower limit: few trials are fitted without any residual
    least = max(0.0 if noise is None else float(np.sqrt(np.mean(noise**2))), 1e-3)
    model = _fit(space, index, scaled, (), top, least, None, expected)
    while pairs and len(model.pairs) < PAIRS and (pair := _missing_pair(model, index, scaled)):
        better = _fit(space, index, scaled, (*model.pairs, pair), top, least, model, expected)
        if better.sigma > (1 - MIN_IMPROVEMENT) * model.sigma or better.gammas().min() < 0:
            break
        model = better
    return model


def _prior(formula: DamageModel, top: float, expects: bool) -> tuple[Floats, Floats]:
    """Mean and spread of theta before any score, in its order: top, floor, log power, level, slope; components, ..."""
    parts, (of_component, of_step) = len(formula.sizes), EXPECTED_PRIOR if expects else PRIOR
    pairs = len(formula.pairs)
    center = np.concatenate([[top, 0.0, 0.0, -0.5, 0.0], np.zeros(parts + formula.steps + pairs)])
    own = np.array([0.1, 0.3, 0.5, 2.0, 0.7])
    spread = [own, np.full(parts, of_component), np.full(formula.steps, of_step), np.ones(pairs)]
    return center, np.concatenate(spread)


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
    """Maximum a posteriori fit by Levenberg-Marquardt: data and prior are residuals of one least-squares problem.

    The prior's residuals also give that algorithm what it demands: at least as many residuals as parameters.
    """
    formula = _formula(space, pairs, expected)
    center, spread = _prior(formula, top, expected is not None)
    # gammas stand last in theta: a fit with one pair less is a start for this one once a zero is appended
    theta = center if before is None else np.append(before.theta, 0.0)
    sigma = max(least, 0.05) if before is None else before.sigma
    for _ in range(3 if before is None else 1):  # sigma weighs the data against the prior, and the fit gives sigma
        scale = sigma

        def residuals(t: Floats, scale: float = scale) -> Floats:
            return np.concatenate([(formula.predict(t, index) - score) / scale, (t - center) / spread])

        def slopes(t: Floats, scale: float = scale) -> Floats:
            return np.concatenate([formula.jacobian(t, index) / scale, np.diag(1 / spread)])

        if before is None and theta is center:
            theta = _start(center, residuals)
        solution = least_squares(
            residuals, theta, jac=slopes, method="lm", max_nfev=100 if before is None else 30, xtol=1e-6, ftol=1e-6
        )
        theta = solution.x
        data = solution.jac[: len(score)]
        inverse = np.linalg.inv(solution.jac.T @ solution.jac)
        used = float(np.trace(data @ inverse @ data.T))  # effective parameters: determined by data, not by the prior
        misfit = float(np.sum((formula.predict(theta, index) - score) ** 2))
        sigma = max(least, math.sqrt(misfit / max(len(score) - used, 1.0)))
        if abs(sigma - scale) < 0.02 * scale:
            break
    # not Cholesky's root: rounding can make a nearly singular covariance slightly indefinite
    values, vectors = np.linalg.eigh(inverse)
    root = vectors * np.sqrt(np.maximum(values, 0))
    return Surrogate(space, pairs, theta, root, sigma, formula, index[(index > 0).any(axis=1)])


def _start(center: Floats, residuals: Callable[[Floats], Floats]) -> Floats:
    """The prior's mean, with the level of damage that fits best.

    From a level at which all plans seem to lose everything, a fit does not find back: their scores have no slope there,
    so that the floor becomes their mean.
    """
    starts = [np.concatenate([center[:LEVEL], [level], center[LEVEL + 1 :]]) for level in LEVELS]
    return min(starts, key=lambda theta: float(np.sum(residuals(theta) ** 2)))


def _missing_pair(model: Surrogate, index: Floats, score: Floats) -> tuple[int, int] | None:
    """The pair whose interaction best explains the residuals, where a score test at 1 % over all pairs supports it.

    It finds only pairs that do more damage together than the sum of both: with a negative gamma, two ruined components
    could be predicted to make a good model, and damage below the sum is already described by the power of the curve.
    """
    formula, theta = model.formula, model.theta
    damages = np.column_stack([d[index[:, c]] for c, d in enumerate(model.damages())])
    by_eta = formula.curve(theta, formula.eta(theta, damages))[2]
    residuals = (score - formula.predict(theta, index)) / model.sigma
    jac = formula.jacobian(theta, index) / model.sigma
    candidates = [pair for pair in itertools.combinations(range(len(formula.sizes)), 2) if pair not in model.pairs]
    # with fewer trials than half the parameters, nearly every pair explains the residuals
    if not candidates or len(score) < formula.length / 2:
        return None
    normal = model.root @ model.root.T
    best, strongest = None, float(norm.isf(0.01 / len(candidates)))
    for a, b in candidates:
        column = by_eta * damages[:, a] * damages[:, b] / model.sigma  # the prediction's derivative by this gamma
        spare = column - jac @ (normal @ (jac.T @ column))  # what no change of the other parameters explains as well
        weight = float(column @ spare)
        strength = float(spare @ residuals) / math.sqrt(weight) if weight > 1e-6 else 0.0
        if strength > strongest:
            best, strongest = (a, b), strength
    return best
