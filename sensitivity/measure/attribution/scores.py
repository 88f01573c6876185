"""SCORES: cheap scores of every component at every scheme, higher for more damage, each with its cost in seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sensitivity.measure.attribution import coverage, layer_scores, pass_scores
from sensitivity.measure.attribution.calibrated import Calibrated, Scores
from sensitivity.spec.errors import UserError, unknown

# name -> the function that scores every component at every scheme, from what calibration found
SCORES: dict[str, Callable[[Calibrated], Scores]] = {
    "weight": layer_scores.relative_weight_error,
    "gram": layer_scores.relative_gram_error,
    "kfac": layer_scores.kfac,
    "swing": layer_scores.swing,
    "fisher": layer_scores.fisher_scores,
    "change": layer_scores.gradient_times_change,
    "path": coverage.path_scores,
    "coverage": coverage.coverage_scores,
    "kl": pass_scores.divergence,
    "loss": pass_scores.loss,
    "higgs": pass_scores.linear_theorem,
}
# the properties of Calibrated that each score needs; scores that need the same one share it
NEEDS = {
    "weight": ("layers",),
    "gram": ("layers",),
    "kfac": ("layers", "squares"),
    "swing": ("layers", "squares"),
    "fisher": ("fisher",),
    "change": ("change",),
    "path": ("path_integral_shares",),
    "coverage": ("path_integral_shares", "answers"),
    "kl": ("answers", "one_at_a_time"),
    "loss": ("answers", "one_at_a_time"),
    "higgs": ("layers", "answers"),
}
WITH_ANSWERS = tuple(name for name in SCORES if name not in ("weight", "gram"))  # scores that need right answers
# scores whose sum over a plan's components predicts a change of the answers: the field of Change, and the function
# that predicts it from the sum
PREDICTS: dict[str, tuple[str, Callable[[Calibrated, float], float]]] = {
    # near the float model the divergence is half the quadratic form of the Fisher matrix
    "kfac": ("divergence", lambda calibrated, total: total / 2),
    "fisher": ("divergence", lambda calibrated, total: total / 2),
    "change": ("loss", lambda calibrated, total: total),
    "path": ("loss", lambda calibrated, total: total),
    "coverage": ("loss", lambda calibrated, total: coverage.predicted(total, coverage.saturation(calibrated))),
    "kl": ("divergence", lambda calibrated, total: total),
    "loss": ("loss", lambda calibrated, total: total),
    "higgs": ("divergence", lambda calibrated, total: total),
}


@dataclass(frozen=True)
class Attribution:
    """One row of SCORES, computed: the score of each component at each scheme, and its cost in CPU seconds.

    The cost of what several scores share (errors of weights, a backward pass) is counted in full for each of them.
    kept: whether it was computed by an earlier run, which had this cost.
    """

    name: str
    scores: Scores
    seconds: float
    kept: bool = False


def attribute(calibrated: Calibrated, names: Sequence[str]) -> list[Attribution]:
    """Compute some scores of SCORES."""
    for name in names:
        if name not in SCORES:
            raise unknown("score", name, SCORES)
    shared = dict.fromkeys(dict.fromkeys(need for name in names for need in NEEDS.get(name, ())), 0.0)
    calibrated.gather(*shared)  # together, so that they share backward passes
    for need in shared:
        began = time.process_time()
        getattr(calibrated, need)
        shared[need] = calibrated.seconds.get(need, time.process_time() - began)
    found = []
    for name in names:
        began = time.process_time()
        scores = SCORES[name](calibrated)
        own = time.process_time() - began
        found.append(Attribution(name, scores, own + sum(shared[need] for need in NEEDS.get(name, ()))))
    for scored in found:
        _check_finite(scored)
    return found


def _check_finite(scored: Attribution) -> None:
    """Raise an error where a score is NaN or infinite: a plan that is chosen by it would be arbitrary."""
    for component, scores in scored.scores.items():
        for scheme, value in scores.items():
            if not math.isfinite(value):
                raise UserError(
                    f"the {scored.name} score of {component} at {scheme} is NaN or infinite; run the model in float32 "
                    "(--dtype fp32)"
                )
