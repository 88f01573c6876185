"""How damage adds up over components and becomes a score: the surrogate's parameters, predictions and derivatives."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Floats = np.ndarray


@dataclass(frozen=True)
class DamageModel:
    """Where each parameter lies in theta: top, floor, log power, level, slope, components, steps, pairs."""

    sizes: tuple[int, ...]
    family_start: tuple[tuple[int, ...], ...]  # per component, per step: the index of the step it builds on, or -1
    bits: tuple[tuple[int, ...], ...]  # per component, per step
    above: tuple[tuple[int, ...], ...]  # the bits one step higher in the family (16 = native)
    pairs: tuple[tuple[int, int], ...]

    @property
    def steps(self) -> int:
        return sum(self.sizes)

    @property
    def length(self) -> int:
        return 5 + len(self.sizes) + self.steps + len(self.pairs)

    @cached_property
    def owner(self) -> Floats:
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @cached_property
    def first(self) -> Floats:
        return np.cumsum([0, *self.sizes])

    @cached_property
    def base(self) -> Floats:
        """Logarithm of the expected steps: damage e-folds per bit and is 1 at three bits."""
        steps = zip(itertools.chain(*self.bits), itertools.chain(*self.above), strict=True)
        return np.array([math.log(math.exp(3 - b) - math.exp(3 - a)) if a > b else -12.0 for b, a in steps])

    @cached_property
    def falling(self) -> Floats:
        return np.array([4.0 - b for bits in self.bits for b in bits])

    @cached_property
    def chain(self) -> Floats:
        """Steps x steps: which steps add up to the damage of a choice."""
        matrix = np.eye(self.steps)
        for c, parents in enumerate(self.family_start):
            for i, parent in enumerate(parents):
                if parent >= 0:
                    matrix[self.first[c] + i] += matrix[self.first[c] + parent]
        return matrix

    def flat(self, theta: Floats) -> tuple[Floats, Floats]:
        """Steps, and damages of all choices but native."""
        parts = len(self.sizes)
        log = self.base + theta[3] + theta[4] * self.falling + theta[5 + self.owner]
        log = log + theta[5 + parts : 5 + parts + self.steps]
        steps = np.exp(np.clip(log, -30, 6))
        return steps, self.chain @ steps

    def damages(self, theta: Floats) -> list[Floats]:
        _, flat = self.flat(theta)
        return [np.concatenate([[0.0], flat[a:b]]) for a, b in itertools.pairwise(self.first)]

    def predict(self, theta: Floats, index: Floats) -> Floats:
        damages = np.column_stack([d[index[:, c]] for c, d in enumerate(self.damages(theta))])
        return np.asarray(self.curve(theta, self.eta(theta, damages))[0])

    def eta(self, theta: Floats, damages: Floats) -> Floats:
        gammas = theta[self.length - len(self.pairs) :]
        eta = np.asarray(damages.sum(axis=1))
        for gamma, (a, b) in zip(gammas, self.pairs, strict=True):
            eta = eta + gamma * damages[:, a] * damages[:, b]
        return eta

    def power(self, theta: Floats) -> float:
        return math.exp(min(max(float(theta[2]), -2.0), 2.0))

    def curve(self, theta: Floats, eta: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """The score; what is left of the quality; and derivatives of the score by eta and by the log of the power."""
        top, floor, power = theta[0], theta[1], self.power(theta)
        eta = np.maximum(eta, 1e-9)
        bent = np.minimum(eta**power, 700.0)
        left = np.exp(-bent)
        slope = -(top - floor) * left * bent
        return floor + (top - floor) * left, left, slope * power / eta, slope * power * np.log(eta)

    def eta_at(self, theta: Floats, score: float) -> float:
        top, floor, power = theta[0], theta[1], self.power(theta)
        if score > top:
            return -1.0
        return math.inf if score <= floor else float((-math.log((score - floor) / (top - floor))) ** (1 / power))

    def jacobian(self, theta: Floats, index: Floats) -> Floats:
        steps, flat = self.flat(theta)
        parts, gammas = len(self.sizes), theta[self.length - len(self.pairs) :]
        padded = [np.concatenate([[0.0], flat[a:b]]) for a, b in itertools.pairwise(self.first)]
        damages = np.column_stack([d[index[:, c]] for c, d in enumerate(padded)])
        _, left, by_eta, by_power = self.curve(theta, self.eta(theta, damages))
        out = np.zeros((len(index), self.length))
        out[:, 0], out[:, 1], out[:, 2] = left, 1 - left, by_power
        by_step = np.zeros((len(index), self.steps))
        for c, first in enumerate(self.first[:-1]):
            weight = np.ones(len(index))
            for gamma, (a, b) in zip(gammas, self.pairs, strict=True):
                weight = weight + (gamma * damages[:, b] if a == c else gamma * damages[:, a] if b == c else 0.0)
            used = index[:, c] > 0
            by_step[used] += weight[used, None] * self.chain[first + index[used, c] - 1]
        by_step *= by_eta[:, None] * steps
        out[:, 3] = by_step.sum(axis=1)
        out[:, 4] = by_step @ self.falling
        out[:, 5 + parts : 5 + parts + self.steps] = by_step
        for c in range(parts):
            out[:, 5 + c] = by_step[:, self.owner == c].sum(axis=1)
        for k, (a, b) in enumerate(self.pairs):
            out[:, self.length - len(self.pairs) + k] = by_eta * damages[:, a] * damages[:, b]
        return out
