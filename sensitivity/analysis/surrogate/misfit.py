"""Misfit: what the surrogate's formula misses, as a Gaussian process over the bits of all components (kriging)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from scipy.linalg.lapack import dpotri
from scipy.optimize import minimize

from sensitivity.analysis.surrogate.damage import DamageModel

Floats = np.ndarray
MAX_PLANS = 256  # plans from which the hyperparameters are fitted; all plans then correct the prediction
# the prior of the hyperparameters: mean and spread of their logarithms, those of SCORE_SD as a share of sigma
LENGTH_SCALE, SCORE_SD, LOG_DAMAGE_SD = (0.9, 0.7), (-0.7, 1.5), (-2.3, 1.0)
NOISE_SCALE, LOG_DAMAGE_NOISE = (-0.7, 1.5), (-3.5, 1.0)
KNOWN = (0.0, 0.5)  # instead of NOISE_SCALE if the noise is known: plans share examples, so differences are less noisy
BOUNDS = ((0.8, 4.0), (-12.0, 2.0), (-9.0, 2.0), (-9.0, 2.0), (-9.0, 2.0))
LOG_ZERO = -40.0  # stands for the logarithm of zero
ODDS = math.log(20)  # predictions use the process if it makes scores likelier by this factor (a logarithm)
MIN_NOISE = 1e-4  # as a share of the largest score: with less, the matrix may be singular
JITTER = 1e-12  # added to the diagonal of an indefinite covariance, as a share of its largest entry
MAX_STRETCH = 1.5  # intervals are widened by at most this factor


@dataclass(frozen=True)
class Hyperparameters:
    """How far the process reaches, how large it is, and how much of a score is noise; in the order of the fit."""

    length_scale: float  # of the correlation, in octaves of bits summed over components
    score_sd: float  # standard deviation of the misfit at any score
    log_damage_sd: float  # standard deviation of the logarithm of total damage, which matters where the score falls
    noise_scale: float  # factor of the noise that was given
    log_damage_noise: float  # standard deviation of the logarithm of total damage between scores of one plan

    @classmethod
    def of(cls, logs: Floats) -> Hyperparameters:
        """The hyperparameters with these logarithms."""
        return cls(*(math.exp(value) for value in logs))


@dataclass(frozen=True)
class Misfit:
    """A Gaussian process on the differences between measured scores and the formula's predictions.

    The more alike the widths of two plans, the more alike the formula misses their scores: the covariance falls
    exponentially with the sum of their distances in octaves of bits. It is larger where the score falls steeply, since
    an error in the damage shows there. Without noise in the scores, the process runs through them.
    """

    formula: DamageModel
    theta: Floats  # of the fit
    distances: tuple[Floats, ...]  # per component, between any two of its choices
    index: Floats  # the plans that were measured, each once
    score: Floats  # the mean of each plan's measured scores
    fitted: Hyperparameters
    corrects: bool  # whether predictions are corrected; if not, the data do not show that the formula misses anything
    noise: float  # standard deviation of one measured score around the truth
    stretch: float  # factor that widens intervals, so that they hold scores that are predicted from all others
    root: Floats  # a square root of theta's covariance
    shift: Floats  # the change of theta, to first order, once the process explains a part of what was noise
    shared: Floats  # per measured plan, standard deviation of the noise that all plans have in common
    _factor: Floats = field(repr=False)  # Cholesky's factor of the covariance of measured scores

    def corrected(self, thetas: Floats, index: Floats, covariance: Floats | None = None) -> Floats:
        """What the process adds to the predictions of plans under each of these thetas, thetas x plans."""
        if not self.corrects:
            return np.zeros((len(thetas), len(index)))
        between = self.covariance(index) if covariance is None else covariance
        predicted = np.stack([self.formula.predict(theta, self.index) for theta in thetas])
        missed = self.score - predicted - self._shifted(self.index)
        return np.asarray(self._shifted(index) + (between @ cho_solve((self._factor, True), missed.T)).T)

    def _shifted(self, index: Floats) -> Floats:
        """By how much the shift of theta changes predictions."""
        return np.asarray(self.formula.jacobian(self.theta, index) @ self.shift)

    def covariance(self, index: Floats) -> Floats:
        """The covariance of plans with the measured ones, plans x measured."""
        correlation = _correlation(_distances(self.distances, index, self.index), self.fitted.length_scale)
        return np.asarray(correlation * _variance(self.fitted, self._steep(index), self._steep(self.index)))

    def spread(self, index: Floats, covariance: Floats) -> Floats:
        """Standard deviation of the process at some plans, given all measured scores."""
        own = self.fitted.score_sd**2 + (self.fitted.log_damage_sd * self._steep(index)) ** 2
        known = solve_triangular(self._factor, covariance.T, lower=True)
        missed = cho_solve((self._factor, True), self.score - self.formula.predict(self.theta, self.index))
        # where predictions are not corrected, the correction counts as uncertainty
        left_out = np.zeros(len(index)) if self.corrects else (covariance @ missed) ** 2
        order = np.argsort(self.score)
        shared = np.interp(self.formula.predict(self.theta, index), self.score[order], self.shared[order])
        return np.asarray(np.sqrt(np.maximum(own - (known**2).sum(axis=0), 0.0) + left_out + shared**2))

    def _steep(self, index: Floats) -> Floats:
        return steepness(self.formula, self.theta, index)


def fit_misfit(
    formula: DamageModel,
    theta: Floats,
    prior: tuple[Floats, Floats],
    distances: tuple[Floats, ...],
    index: Floats,
    score: Floats,
    noise: Floats | None,
    sigma: float,
) -> Misfit:
    """The process that best explains what the formula with its fitted theta misses.

    prior: center and spread of theta. noise: standard deviation of each score, where it is known. sigma: that of
    scores around the formula's predictions.
    """
    unit = float(np.abs(score).max()) or 1.0
    shape = np.full(len(score), max(sigma, MIN_NOISE * unit)) if noise is None else np.maximum(noise, MIN_NOISE * unit)
    index, score, shape = merged(index, score, shape)
    jac = formula.jacobian(theta, index)
    steep = steepness(formula, theta, index)
    missed = score - formula.predict(theta, index)
    scales = _prior(max(sigma, MIN_NOISE * unit), noise is not None)
    evidence = Evidence.of(formula, theta, prior, distances, index, score, shape, scales, noise is not None)
    plain, cost_plain = evidence.best(process=False)
    full, cost = evidence.best(process=True)
    corrects = cost_plain - cost > ODDS
    best = full if corrects else plain
    between = _correlation(_distances(distances, index, index), full.length_scale) * _variance(full, steep, steep)
    np.fill_diagonal(between, np.diag(between) + _noise(full, shape, steep))
    factor = _factored(between)
    solved = cho_solve((factor, True), jac)
    inverse = np.linalg.inv(jac.T @ solved + np.diag(prior[1] ** -2.0))
    pulled = solved.T @ missed + (prior[0] - theta) / prior[1] ** 2
    values, vectors = np.linalg.eigh(inverse)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    typical = float(np.sqrt(np.mean(_noise(best, shape, steep))))
    # plans run on the same examples, so a part of their noise is common: the given noise less the fitted one
    shared = shape * math.sqrt(max(1 - best.noise_scale**2, 0.0)) * (noise is not None)
    return Misfit(
        formula, theta, distances, index, score, full, corrects, typical, evidence.stretch(best, corrects),
        root, inverse @ pulled, shared, factor,
    )  # fmt: skip


def cost_of_fit(
    formula: DamageModel,
    theta: Floats,
    prior: tuple[Floats, Floats],
    distances: tuple[Floats, ...],
    index: Floats,
    score: Floats,
    noise: Floats,
) -> float:
    """Minus the logarithm of the likelihood of scores, integrated over the prior of theta around its fit."""
    index, score, noise = merged(index, score, noise)
    scales = _prior(float(noise.mean()), True)
    return Evidence.of(formula, theta, prior, distances, index, score, noise, scales, True).best(process=False)[1]


def merged(index: Floats, score: Floats, noise: Floats) -> tuple[Floats, Floats, Floats]:
    """Each plan once, with the mean of its scores and the noise of that mean."""
    rows, place, count = np.unique(index, axis=0, return_inverse=True, return_counts=True)
    place = place.ravel()
    mean = np.bincount(place, score) / count
    return rows, mean, np.sqrt(np.bincount(place, noise**2)) / count


def _prior(sigma: float, known: bool) -> tuple[Floats, Floats]:
    """Center and spread of the logarithms of the hyperparameters."""
    misfit = LENGTH_SCALE, (SCORE_SD[0] + math.log(sigma), SCORE_SD[1]), LOG_DAMAGE_SD
    pairs = (*misfit, KNOWN, (LOG_ZERO, 1.0)) if known else (*misfit, NOISE_SCALE, LOG_DAMAGE_NOISE)
    return np.array([mean for mean, _ in pairs]), np.array([spread for _, spread in pairs])


@dataclass(frozen=True)
class Evidence:
    """The likelihood of measured scores under hyperparameters, integrated over the prior of theta."""

    distances: Floats
    steep: Floats
    loose: Floats
    missed: Floats  # measured scores minus the prediction of the prior's center, to first order
    noise: Floats
    prior: tuple[Floats, Floats]
    known: bool  # whether the noise is known up to a factor

    @classmethod
    def of(
        cls,
        formula: DamageModel,
        theta: Floats,
        of_theta: tuple[Floats, Floats],
        distances: tuple[Floats, ...],
        index: Floats,
        score: Floats,
        noise: Floats,
        prior: tuple[Floats, Floats],
        known: bool,
    ) -> Evidence:
        """The likelihood of scores around a fitted theta, with its prior's center and spread; of MAX_PLANS at most."""
        some = np.random.default_rng(0).permutation(len(score))[:MAX_PLANS]
        index, score = index[some], score[some]
        jac = formula.jacobian(theta, index)
        # theta is uncertain as well: to first order, one more Gaussian process, with the covariance of its prior
        loose = (jac * of_theta[1]) @ (jac * of_theta[1]).T
        missed = score - formula.predict(theta, index) + jac @ (theta - of_theta[0])
        steep = steepness(formula, theta, index)
        return cls(_distances(distances, index, index), steep, loose, missed, noise[some], prior, known)

    def best(self, process: bool) -> tuple[Hyperparameters, float]:
        """The most likely hyperparameters, and their cost; without the process, only the noise is fitted."""
        free = [*([0, 1, 2] if process else []), 3, *([] if self.known else [4])]
        start = self.prior[0].copy()

        def cost(some: Floats) -> tuple[float, Floats]:
            logs = start.copy()
            logs[free] = some
            value, slope = self.cost(logs, process)
            return value, slope[free]

        found = minimize(
            cost, start[free], jac=True, method="L-BFGS-B", bounds=[BOUNDS[i] for i in free], options={"maxiter": 25}
        )
        logs = start.copy()
        logs[free] = found.x
        return Hyperparameters.of(logs), float(found.fun)

    def cost(self, logs: Floats, process: bool) -> tuple[float, Floats]:
        """Minus the logarithm of the posterior density of hyperparameters, and its derivatives."""
        of = Hyperparameters.of(logs)
        covariance, parts = self._covariance(of, process)
        factor = _factored(covariance)
        solved = cho_solve((factor, True), self.missed)
        from_prior = (logs - self.prior[0]) / self.prior[1]
        from_prior[:3] *= process
        value = 0.5 * self.missed @ solved + np.log(np.diag(factor)).sum() + 0.5 * from_prior @ from_prior
        by_covariance = _inverse(factor) - np.outer(solved, solved)
        own = np.diag(by_covariance)
        slopes = [float(np.vdot(by_covariance, part)) for part in parts] or [0.0, 0.0, 0.0]
        by_noise = (of.noise_scale * self.noise) ** 2, (of.log_damage_noise * self.steep) ** 2
        slopes += [2 * float(own @ each) for each in by_noise]
        return float(value), 0.5 * np.array(slopes) + from_prior / self.prior[1]

    def _covariance(self, of: Hyperparameters, process: bool) -> tuple[Floats, list[Floats]]:
        """The covariance of measured scores; with the process, also its derivatives by the logarithms of its three."""
        noise = _noise(of, self.noise, self.steep)
        if not process:
            plain = self.loose.copy()
            np.fill_diagonal(plain, np.diag(plain) + noise)
            return plain, []
        correlation = _correlation(self.distances, of.length_scale)
        at_any_score = of.score_sd**2 * correlation
        where_it_falls = of.log_damage_sd**2 * correlation * np.outer(self.steep, self.steep)
        misfit = at_any_score + where_it_falls
        covariance = self.loose + misfit
        np.fill_diagonal(covariance, np.diag(covariance) + noise)
        return covariance, [misfit * self.distances / of.length_scale, 2 * at_any_score, 2 * where_it_falls]

    def stretch(self, of: Hyperparameters, process: bool) -> float:
        """The factor by which 95 % intervals are widened to hold 95 % of scores, each predicted from the others."""
        factor = _factored(self._covariance(of, process)[0])
        deviations = np.abs(cho_solve((factor, True), self.missed)) / np.sqrt(np.diag(_inverse(factor)))
        return float(np.clip(np.quantile(deviations, 0.95) / 1.96, 1.0, MAX_STRETCH))


def _factored(covariance: Floats) -> Floats:
    """Cholesky's factor of a covariance, with more on its diagonal where rounding made an eigenvalue negative."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        more = JITTER * np.diag(covariance).max() * np.eye(len(covariance))
        return np.linalg.cholesky(covariance + more)


def _inverse(factor: Floats) -> Floats:
    """The inverse of a matrix with this lower factor; LAPACK's routine for it takes a third of what solving takes."""
    inverse = np.asarray(dpotri(factor, lower=1)[0])  # its lower triangle
    return np.asarray(np.tril(inverse) + np.tril(inverse, -1).T)


def _noise(of: Hyperparameters, shape: Floats, steep: Floats) -> Floats:
    """The variances of measured scores around the truth."""
    return np.asarray((of.noise_scale * shape) ** 2 + (of.log_damage_noise * steep) ** 2)


def steepness(formula: DamageModel, theta: Floats, index: Floats) -> Floats:
    """By how much the score falls when the logarithm of total damage rises, at each plan."""
    damages = np.column_stack([each[index[:, c]] for c, each in enumerate(formula.damages(theta))])
    eta = formula.eta(theta, damages)
    return np.asarray(np.abs(formula.curve(theta, eta)[2]) * np.maximum(eta, 0.0))


def _distances(distances: tuple[Floats, ...], some: Floats, others: Floats) -> Floats:
    """The distances between plans and others: sums over components."""
    total = np.zeros((len(some), len(others)))
    for c, between in enumerate(distances):
        total += between[some[:, c]].take(others[:, c], axis=1)
    return total


def _correlation(distances: Floats, length_scale: float) -> Floats:
    """The correlation between what the formula misses of two plans, from 0 to 1."""
    return np.asarray(np.exp(-distances / length_scale))


def _variance(of: Hyperparameters, steep: Floats, others: Floats) -> Floats:
    """The covariance of plans with others if they had the same widths; `_correlation` scales it."""
    return np.asarray(of.score_sd**2 + of.log_damage_sd**2 * np.outer(steep, others))
