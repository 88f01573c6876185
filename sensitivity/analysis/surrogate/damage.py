"""The surrogate's formula: each component's damage, their sum, the score, and its derivatives by each parameter."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Floats = np.ndarray
LEVEL = 3  # the place of damage's level in theta
LEAST_ETA = 1e-9  # the least total damage of which a logarithm is taken


@dataclass(frozen=True)
class DamageModel:
    """The formula of the surrogate, and where each of its parameters lies in the vector theta.

    theta = [top, floor, log power, level, slope, one term per component, one per step, one gamma per pair].
    A step is the damage that a component adds when it goes from one width to the next lower one of the same family:

        log(step) = base + level + slope * (4 - bits) + the component's term + the step's own term
        damage of a choice = the sum of the steps down to it
        eta = the sum of damages over components + gamma * damage a * damage b, over pairs
        score = floor + (top - floor) * exp(-eta ** power)
    """

    sizes: tuple[int, ...]  # per component: how many schemes it may have besides native
    parents: tuple[tuple[int, ...], ...]  # per component, per step: which step it adds to, or -1 for native
    bits: tuple[tuple[float, ...], ...]  # per component, per step
    above: tuple[tuple[float, ...], ...]  # the bits one step higher in the family (16 = native)
    pairs: tuple[tuple[int, int], ...]
    expected: tuple[float, ...] | None = None  # per step of all components: the logarithm of its expected damage

    @property
    def steps(self) -> int:
        """Number of steps of all components together."""
        return sum(self.sizes)

    @property
    def length(self) -> int:
        """Number of parameters in theta."""
        return 5 + len(self.sizes) + self.steps + len(self.pairs)

    @cached_property
    def owner(self) -> Floats:
        """For each step, the position of its component."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @cached_property
    def first(self) -> Floats:
        """For each component, the position of its first step; at the end, the number of steps."""
        return np.cumsum([0, *self.sizes])

    @cached_property
    def base(self) -> Floats:
        """Expected logarithm of each step: as given, else from a damage of exp(3 - bits), which is 1 at three bits."""
        if self.expected is not None:
            return np.array(self.expected)
        # a scheme that is no narrower than the one above it (16 bits stored as such) does hardly any damage: exp(-12)
        steps = zip(itertools.chain(*self.bits), itertools.chain(*self.above), strict=True)
        return np.array([math.log(math.exp(3 - b) - math.exp(3 - a)) if a > b else -12.0 for b, a in steps])

    @cached_property
    def below_four(self) -> Floats:
        """How far each step's width lies below four bits, which the slope multiplies."""
        return np.array([4.0 - b for bits in self.bits for b in bits])

    @cached_property
    def chain(self) -> Floats:
        """Steps x steps, of 0 and 1: row i marks the steps that add up to the damage of choice i."""
        # a parent stands before its child (Space sorts by falling bits), so its row is complete when it is added
        matrix = np.eye(self.steps)
        for c, own in enumerate(self.parents):
            for i, parent in enumerate(own):
                if parent >= 0:
                    matrix[self.first[c] + i] += matrix[self.first[c] + parent]
        return matrix

    def steps_and_damages(self, theta: Floats) -> tuple[Floats, Floats]:
        """The steps, and the damage of every choice but native; all components one after the other."""
        parts = len(self.sizes)
        log = self.base + theta[3] + theta[4] * self.below_four + theta[5 + self.owner]
        log = log + theta[5 + parts : 5 + parts + self.steps]
        # the optimizer tries extreme parameters on its way, for which exp would overflow
        steps = np.exp(np.clip(log, -30, 6))
        return steps, self.chain @ steps

    def damages(self, theta: Floats) -> list[Floats]:
        """Per component, the damage of each of its choices; native is the first and has none."""
        _, flat = self.steps_and_damages(theta)
        return [np.concatenate([[0.0], flat[a:b]]) for a, b in itertools.pairwise(self.first)]

    def predict(self, theta: Floats, index: Floats) -> Floats:
        """Predicted scores of plans; a plan is a row of positions among the choices of each component."""
        return np.asarray(self.curve(theta, self._eta_of(theta, index))[0])

    def eta(self, theta: Floats, damages: Floats) -> Floats:
        """Total damage of each plan: summed over components, plus the products of interacting pairs."""
        gammas = theta[self.length - len(self.pairs) :]
        eta = np.asarray(damages.sum(axis=1))
        for gamma, (a, b) in zip(gammas, self.pairs, strict=True):
            eta = eta + gamma * damages[:, a] * damages[:, b]
        return eta

    def power(self, theta: Floats) -> float:
        """Exponent of the curve, limited to exp(-2) ... exp(2), which keeps eta ** power finite."""
        return math.exp(min(max(float(theta[2]), -2.0), 2.0))

    def curve(self, theta: Floats, eta: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """The score, the remaining fraction exp(-eta ** power), and the score's derivatives by eta and by log power."""
        top, floor, power = theta[0], theta[1], self.power(theta)
        eta = np.maximum(eta, LEAST_ETA)  # the derivatives divide by eta and take its logarithm
        exponent = np.minimum(eta**power, 700.0)  # exp(-700) is about the smallest double
        remaining = np.exp(-exponent)
        # derivative by log(eta ** power); the chain rule gives the two that are returned
        slope = -(top - floor) * remaining * exponent
        return floor + (top - floor) * remaining, remaining, slope * power / eta, slope * power * np.log(eta)

    def eta_at(self, theta: Floats, score: float) -> float:
        """The inverse of the curve: damage at this score; -1 above the top, infinite at or below the floor."""
        top, floor, power = theta[0], theta[1], self.power(theta)
        if score > top:
            return -1.0
        return math.inf if score <= floor else float((-math.log((score - floor) / (top - floor))) ** (1 / power))

    def jacobian(self, theta: Floats, index: Floats) -> Floats:
        """Derivatives of each plan's score by each entry of theta, plans x entries.

        In closed form: finite differences would cost a prediction per parameter in every iteration of the fit.
        """
        eta, out = self._eta_and_slopes(theta, index)
        _, remaining, by_eta, by_power = self.curve(theta, eta)
        out *= by_eta[:, None]
        out[:, 0], out[:, 1], out[:, 2] = remaining, 1 - remaining, by_power
        return out

    def mean_exponent(self, theta: Floats, index: Floats, weights: Floats) -> float:
        """The weighted mean over plans of log(eta ** power)."""
        return self.power(theta) * float(weights @ np.log(np.maximum(self._eta_of(theta, index), LEAST_ETA)))

    def exponent_slopes(self, theta: Floats, index: Floats, weights: Floats) -> Floats:
        """Derivatives of `mean_exponent` by each entry of theta."""
        eta, slopes = self._eta_and_slopes(theta, index)
        out = np.asarray(self.power(theta) * (weights @ (slopes / np.maximum(eta, LEAST_ETA)[:, None])))
        out[2] = self.mean_exponent(theta, index, weights)  # power is the exponential of this entry
        return out

    def slopes_by_exponent(self, theta: Floats, index: Floats) -> Floats:
        """Derivative of each plan's score by log(eta ** power)."""
        eta = np.maximum(self._eta_of(theta, index), LEAST_ETA)
        _, _, by_eta, _ = self.curve(theta, eta)
        return np.asarray(by_eta * eta / self.power(theta))

    def _eta_of(self, theta: Floats, index: Floats) -> Floats:
        """Total damage of each plan."""
        return self.eta(theta, np.column_stack([d[index[:, c]] for c, d in enumerate(self.damages(theta))]))

    def _eta_and_slopes(self, theta: Floats, index: Floats) -> tuple[Floats, Floats]:
        """Total damage of each plan, and its derivatives by each entry of theta, plans x entries."""
        steps, flat = self.steps_and_damages(theta)
        parts, gammas = len(self.sizes), theta[self.length - len(self.pairs) :]
        padded = [np.concatenate([[0.0], flat[a:b]]) for a, b in itertools.pairwise(self.first)]
        damages = np.column_stack([d[index[:, c]] for c, d in enumerate(padded)])
        out = np.zeros((len(index), self.length))
        by_step = np.zeros((len(index), self.steps))
        for c, first in enumerate(self.first[:-1]):
            # derivative of eta by the damage of component c: 1, plus gamma times the damage of each of its partners
            weight = np.ones(len(index))
            for gamma, (a, b) in zip(gammas, self.pairs, strict=True):
                weight = weight + (gamma * damages[:, b] if a == c else gamma * damages[:, a] if b == c else 0.0)
            used = index[:, c] > 0  # native has no steps
            by_step[used] += weight[used, None] * self.chain[first + index[used, c] - 1]
        by_step *= steps  # parameters enter as the logarithm of a step, whose derivative is the step
        out[:, 3] = by_step.sum(axis=1)
        out[:, 4] = by_step @ self.below_four
        out[:, 5 + parts : 5 + parts + self.steps] = by_step
        for c in range(parts):
            out[:, 5 + c] = by_step[:, self.owner == c].sum(axis=1)
        for k, (a, b) in enumerate(self.pairs):
            out[:, self.length - len(self.pairs) + k] = damages[:, a] * damages[:, b]
        return self.eta(theta, damages), out
