"""Checks of scores: how well their sums predict what random plans really do to the answers of calibration data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from sensitivity.measure.attribution.answer_changes import Change
from sensitivity.measure.attribution.calibrated import Calibrated
from sensitivity.measure.attribution.scores import FORETOLD, Attribution
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.spec.plan import Plan, Scheme, fitted

MIN_VALUES = 4  # distinct values; with fewer, no rank correlation is computed
TRIES = 20  # draws per wanted plan: with few components, many draws repeat a plan


@dataclass(frozen=True)
class Check:
    """How a score compares with what plans really do to the calibration data."""

    plans: int
    rank_correlation: float | None  # of the sums of scores with the divergence of the answers
    error: float | None  # RMS error of the damage that the score predicts, as a share of the RMS of the true damage

    def to_json(self) -> dict[str, float | None]:
        """The check as JSON values."""
        return {"plans": self.plans, "rank_correlation": self.rank_correlation, "error": self.error}


@dataclass(frozen=True)
class Checks:
    """The check of each score, and the CPU seconds of one forward pass over the data."""

    by_score: dict[str, Check]  # empty where no plan was run
    pass_seconds: float


def checked(given: Calibrated, scores: Sequence[Attribution], count: int, seed: int = 0) -> Checks:
    """Run random plans of various widths on the calibration data, and compare them with the sums of scores."""
    own = given.answers
    truth: list[tuple[Plan, Change]] = []
    began = time.process_time()
    own.now()
    seconds = time.process_time() - began
    for plan in random_plans(given, count, seed):
        truth.append((plan, own.under(quantized(given.vlm.model, given.parts, plan, None, given.statistics))))
    return Checks({one.name: _compared(given, one, truth) for one in scores} if truth else {}, seconds)


def random_plans(given: Calibrated, count: int, seed: int) -> list[Plan]:
    """Random plans; each draws its schemes from two neighboring widths, so that plans also differ in size."""
    draw, schemes = np.random.default_rng(seed), sorted(given.schemes, key=lambda scheme: scheme.bits)
    plans: dict[Plan, None] = {}
    for i in range(TRIES * count):
        first = i % max(len(schemes) - 1, 1)
        two: list[Scheme] = list(schemes[first : first + 2])
        which = draw.integers(len(two), size=len(given.parts.names))
        chosen = zip(given.parts.components, which, strict=True)
        plans.setdefault(Plan(tuple((one.name, fitted(one, two[int(w)])) for one, w in chosen)))
        if len(plans) == count:
            break
    return list(plans)


def _compared(given: Calibrated, score: Attribution, truth: Sequence[tuple[Plan, Change]]) -> Check:
    sums = [sum(score.scores[name][scheme] for name, scheme in plan.schemes if scheme is not None) for plan, _ in truth]
    real = [change.divergence for _, change in truth]
    enough = min(len(set(sums)), len(set(real))) >= MIN_VALUES
    agreement = float(spearmanr(sums, real).statistic) if enough else None
    if score.name not in FORETOLD:
        return Check(len(truth), agreement, None)
    unit, foretell = FORETOLD[score.name]
    wanted = np.array([getattr(change, unit) for _, change in truth])
    missed = np.array([foretell(given, total) for total in sums]) - wanted
    return Check(len(truth), agreement, float(np.sqrt(np.mean(missed**2) / max(np.mean(wanted**2), 1e-300))))
