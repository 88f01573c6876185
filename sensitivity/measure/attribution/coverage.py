"""Scores from path integrals up to uniform plans: each component's share of the damage, and how damages overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sensitivity.measure.attribution.calibrated import Calibrated, Scores

NEARLY_ALL = 0.99  # the most that a plan may lose, as a share of all that can be lost: logarithms stay finite
ROUNDS = 200  # of the fixed-point iteration, at most; it converges long before


def path_scores(calibrated: Calibrated) -> Scores:
    """Each component's share of the damage of the uniform plan, integrated along the path from the float model."""
    shares = calibrated.path_integral_shares
    return {name: {scheme: shares[scheme][name] for scheme in calibrated.schemes} for name in calibrated.parts.names}


def coverage_scores(calibrated: Calibrated) -> Scores:
    """-log(1 - a) of each component, where a plan covers 1 - prod (1 - a) of all that can be lost (arXiv 2607.12266).

    The integrals here are of the loss, not of the divergence, and `saturation` is all that can be lost. Damage that
    components share is not counted twice.
    """
    limit = saturation(calibrated)
    found: Scores = {name: {} for name in calibrated.parts.names}
    for scheme in calibrated.schemes:
        shares = calibrated.path_integral_shares[scheme]
        covered = coverage_of_shares([max(shares[name], 0.0) / limit for name in calibrated.parts.names])
        for name, share in zip(calibrated.parts.names, covered, strict=True):
            found[name][scheme] = -math.log1p(-share)
    return found


def saturation(calibrated: Calibrated) -> float:
    """All that can be lost: by how much a uniform guess raises the loss, or the worst uniform plan if that is more."""
    guess = sum(math.log(batch.shape[-1]) * len(batch) for batch in calibrated.answers.log_probabilities)
    worst = max(sum(shares.values()) for shares in calibrated.path_integral_shares.values())
    return max(guess - calibrated.answers.loss, worst / NEARLY_ALL)


def coverage_of_shares(shares: Sequence[float]) -> list[float]:
    """Solve for a: the integral of a_i prod (1 - t a_j), j other than i, over t from 0 to 1 is share i.

    These integrals are the terms of the path integral of f(t) = 1 - prod (1 - t a_i).
    """
    nodes, weights = np.polynomial.legendre.leggauss(16)
    t, weights = (nodes + 1) / 2, weights / 2
    wanted = np.array(shares)
    if (total := wanted.sum()) > NEARLY_ALL:
        wanted = wanted * (NEARLY_ALL / total)
    found = wanted.copy()
    for _ in range(ROUNDS):
        left = np.log1p(-t[:, None] * found)  # nodes x components
        others = np.exp(left.sum(1, keepdims=True) - left)
        new = np.minimum(wanted / np.maximum(weights @ others, 1e-12), NEARLY_ALL)
        if np.allclose(new, found, rtol=1e-10, atol=0):
            break
        found = (new + found) / 2
    return [float(value) for value in new]


def predicted(covered: float, limit: float) -> float:
    """The damage of a plan, from the sum of its components' scores."""
    return limit * -math.expm1(-covered)
