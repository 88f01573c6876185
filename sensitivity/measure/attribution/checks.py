"""Checks of scores: how well their sums predict how random plans change the answers on calibration data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from sensitivity.measure.attribution.answer_changes import PredictionChange
from sensitivity.measure.attribution.calibrated import Calibrated
from sensitivity.measure.attribution.scores import PREDICTS, Attribution
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.spec.plan import Plan, Scheme, without_unused_cache

MIN_VALUES = 4  # distinct values; with fewer, no rank correlation is computed
TRIES = 20  # draws per wanted plan: with few components, many draws repeat a plan


@dataclass(frozen=True)
class Check:
    """How well a score predicts what measured plans do to the answers on calibration data."""

    plans: int
    rank_correlation: float | None  # between the sums of scores and the divergence of the answers
    error: float | None  # RMS error of the damage that the score predicts, as a share of the RMS of the true damage

    def to_json(self) -> dict[str, float | None]:
        """The check as JSON values."""
        return {"plans": self.plans, "rank_correlation": self.rank_correlation, "error": self.error}


@dataclass(frozen=True)
class Checks:
    """The check of each score, and the CPU seconds of one forward pass over the data."""

    by_score: dict[str, Check]  # empty where no plan was run
    pass_seconds: float


def check_scores(calibrated: Calibrated, scores: Sequence[Attribution], count: int, seed: int = 0) -> Checks:
    """Run random plans of various widths on the calibration data, and compare them with the sums of scores."""
    answers = calibrated.answers
    truth: list[tuple[Plan, PredictionChange]] = []
    began = time.process_time()
    answers.now()
    seconds = time.process_time() - began
    model, parts, statistics = calibrated.vlm.model, calibrated.parts, calibrated.statistics
    for plan in random_plans(calibrated, count, seed):
        truth.append((plan, answers.under(quantized(model, parts, plan, None, statistics))))
    return Checks({one.name: _compared(calibrated, one, truth) for one in scores} if truth else {}, seconds)


def random_plans(calibrated: Calibrated, count: int, seed: int) -> list[Plan]:
    """Random plans; each draws its schemes from two neighboring widths, so that plans also differ in size."""
    draw, schemes = np.random.default_rng(seed), sorted(calibrated.schemes, key=lambda scheme: scheme.bits)
    plans: dict[Plan, None] = {}
    for i in range(TRIES * count):
        first = i % max(len(schemes) - 1, 1)
        two: list[Scheme] = list(schemes[first : first + 2])
        which = draw.integers(len(two), size=len(calibrated.parts.names))
        chosen = zip(calibrated.parts.components, which, strict=True)
        plans.setdefault(Plan(tuple((one.name, without_unused_cache(one, two[int(w)])) for one, w in chosen)))
        if len(plans) == count:
            break
    return list(plans)


def _compared(calibrated: Calibrated, score: Attribution, truth: Sequence[tuple[Plan, PredictionChange]]) -> Check:
    """Compare a score's sums with the changes that plans made."""
    sums = [sum(score.scores[name][scheme] for name, scheme in plan.schemes if scheme is not None) for plan, _ in truth]
    real = [change.divergence for _, change in truth]
    enough = min(len(set(sums)), len(set(real))) >= MIN_VALUES
    agreement = float(spearmanr(sums, real).statistic) if enough else None
    if score.name not in PREDICTS:
        return Check(len(truth), agreement, None)
    field, predict = PREDICTS[score.name]
    wanted = np.array([getattr(change, field) for _, change in truth])
    misses = np.array([predict(calibrated, total) for total in sums]) - wanted
    return Check(len(truth), agreement, float(np.sqrt(np.mean(misses**2) / max(np.mean(wanted**2), 1e-300))))
