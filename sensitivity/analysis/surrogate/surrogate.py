"""The surrogate: scores of plans predicted from damage that grows as bits fall and adds up over components."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sensitivity.analysis.surrogate.damage import LEVEL, DamageModel
from sensitivity.analysis.surrogate.misfit import Misfit
from sensitivity.analysis.surrogate.space import Space

Floats = np.ndarray
DRAWS = 128  # parameter vectors that are drawn for an interval


@dataclass(frozen=True)
class Surrogate:
    """A fitted surrogate: score = floor + (top - floor) * exp(-eta ** power), where eta is the plan's total damage.

    Within a family of schemes a component's damage rises step by step as bits fall. Steps are fitted as logarithms,
    hence positive: by this formula, fewer bits never predict a better score. A normal prior says that damage doubles or
    trebles with each bit less, and that components and steps differ by some factors; the data soon outweigh it. `theta`
    holds the fitted parameters, `root` a square root of their covariance. What this formula misses is a Gaussian
    process, which may raise or lower a prediction.
    """

    space: Space
    pairs: tuple[tuple[int, int], ...]
    theta: Floats
    root: Floats
    sigma: float  # standard deviation of one measured score around its plan's predicted one
    formula: DamageModel = field(repr=False)
    measured: Floats = field(repr=False)  # the quantized plans that it was fitted to
    misfit: Misfit | None = field(default=None, repr=False)

    def damages(self, theta: Floats | None = None) -> list[Floats]:
        """Per component, the damage of each of its choices."""
        return self.formula.damages(self.theta if theta is None else theta)

    def gammas(self, theta: Floats | None = None) -> Floats:
        """Strength of each interacting pair."""
        theta = self.theta if theta is None else theta
        return np.asarray(theta[len(theta) - len(self.pairs) :])

    def predict(self, index: Floats) -> Floats:
        """Predicted scores of plans, given as rows of positions."""
        expected = self.formula.predict(self.theta, index)
        return expected if self.misfit is None else expected + self.misfit.corrected(self.theta[None], index)[0]

    @property
    def is_formula(self) -> bool:
        """Whether predictions are those of the formula alone, in which the least damage is the best score."""
        return self.misfit is None or not self.misfit.corrects

    def sample(self, draw: np.random.Generator, times: int = DRAWS) -> Floats:
        """Parameter vectors drawn from the normal distribution with the fit's mean and covariance."""
        return np.asarray(self.theta + draw.standard_normal((times, self.root.shape[1])) @ self.root.T)

    def draws(
        self, index: Floats, draw: np.random.Generator | None = None, times: int = DRAWS, explore: bool = False
    ) -> Floats:
        """Scores of plans drawn from their uncertainty, draws x plans; without a generator, the same at every call.

        What the formula misses is drawn for each plan by itself, so draws hold for plans, not for their differences.
        explore: with parameters as `sample` draws them. After few scores these predict far wider than what was measured
        allows, which a search needs where expected damages are wrong.
        """
        draw = draw or np.random.default_rng(0)
        thetas = self.sample(draw, times)
        if not explore:
            thetas = self._near_scores(thetas)
        scores = np.stack([self.formula.predict(theta, index) for theta in thetas])
        if self.misfit is None:
            return scores
        covariance = self.misfit.covariance(index)
        scores = scores + self.misfit.corrected(thetas, index, covariance)
        missed = self.misfit.spread(index, covariance) * draw.standard_normal(scores.shape)
        middle = self.predict(index)
        return np.asarray(middle + self.misfit.stretch * (scores + missed - middle))

    def _near_scores(self, thetas: Floats) -> Floats:
        """Drawn vectors, each with the level of damage that keeps its predictions near the measured scores.

        Scores decide the mean of log(eta ** power) over the plans whose scores it moves, but level and power only
        together, and not along a straight line: of vectors drawn from a normal distribution, few predict what was
        measured. So the level is set to what gives the mean that the same draw has where it is taken as linear.
        """
        weights = self.formula.slopes_by_exponent(self.theta, self.measured) ** 2
        if not weights.sum() > 0:
            return thetas
        near, plans, weights = thetas.copy(), self.measured, weights / weights.sum()
        slopes = self.formula.exponent_slopes(self.theta, plans, weights)
        wanted = self.formula.mean_exponent(self.theta, plans, weights) + (thetas - self.theta) @ slopes
        for theta, one in zip(near, wanted, strict=True):
            missed = one - self.formula.mean_exponent(theta, plans, weights)
            theta[LEVEL] += missed / self.formula.power(theta)
        return near

    @property
    def power(self) -> float:
        """Exponent of the curve."""
        return self.formula.power(self.theta)

    def total_damage(self, row: Floats) -> float:
        """The total damage of a plan, given as a row of positions."""
        damages = np.array([[each[i] for each, i in zip(self.damages(), row, strict=True)]])
        return float(self.formula.eta(self.theta, damages)[0])

    def at_damage(self, eta: Floats) -> Floats:
        """Score at a total damage."""
        return self.formula.curve(self.theta, eta)[0]

    def eta_at(self, score: float) -> float:
        """The total damage at which the score falls to a given value; negative where full precision scores less."""
        return self.formula.eta_at(self.theta, score)
