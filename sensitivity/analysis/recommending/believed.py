"""Believed scores of measured plans: predicted by the surrogate, or measured and shrunk towards the prediction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.stats import chi2

from sensitivity.analysis.allocate.knapsack import Knapsack, Predicted
from sensitivity.analysis.observations import observations_of
from sensitivity.study.scores import paired_difference
from sensitivity.study.study import Study

TOO_CERTAIN = 0.99  # quantile of chi-squared: scores that scatter more show that predictions are too certain
Z95 = 1.96  # half a 95 % interval, in standard deviations


def predicted_shares(study: Study, knapsack: Knapsack, weights: Mapping[str, float]) -> dict[str, float]:
    """For each measured plan, by key, its predicted share of full precision, as a weighted mean over tasks.

    The best of several noisy scores is too high (the winner's curse). The surrogate's prediction equals a measured
    score that has no noise, and smooths noisy ones.
    """
    found: dict[str, float] = {}
    total = sum(weights.values())
    for task, weight in weights.items():
        observations, model = observations_of(study, task), knapsack.models[task]
        predicted = model.predict(knapsack.space.encode(observations.plans)) / (knapsack.full(task) or 1.0)
        for key, share in dict(zip(observations.keys, predicted, strict=True)).items():
            found[key] = found.get(key, 0.0) + weight / total * float(share)
    return {key: score for key, score in found.items() if np.isfinite(score)}


def read_shares(study: Study, weights: Mapping[str, float]) -> dict[str, float]:
    """For each measured plan, by key, the share of full precision that its own scores say, weighted over tasks."""
    shares, total = [], sum(weights.values())
    for task, weight in weights.items():
        observations = observations_of(study, task)
        full = replace(observations, score=observations.steadied).full or 1.0
        shares.append(pd.Series(weight / total * observations.steadied / full).groupby(list(observations.keys)).mean())
    return {str(key): float(share) for key, share in pd.concat(shares, axis=1).sum(axis=1, skipna=False).items()}


def steadied_rows(study: Study, tasks: Iterable[str], frames: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """Per-example scores of plans on the same examples, moved to the means that likelihoods say (see `Link`)."""
    found = list(frames)
    for task in tasks:
        of_task = [frame["task"] == task for frame in frames]
        own = [frame[rows] for frame, rows in zip(frames, of_task, strict=True)]
        link = observations_of(study, task).link
        if link is None or not all("nll" in one and len(one) for one in own):
            continue
        scores = np.array([one["score"].mean() for one in own])
        middle = pd.concat([one.set_index("example")["score"] for one in own], axis=1).mean(axis=1)
        noise = np.array([
            paired_difference(one["score"], middle[one["example"]], one["cluster"]).se for one in own
        ])  # fmt: skip
        moved = link.steadied(scores, np.array([one["nll"].mean() for one in own]), noise, centered=True) - scores
        for i, rows in enumerate(of_task):
            found[i] = found[i].assign(score=found[i]["score"] + np.where(rows, moved[i], 0.0))
    return found


def shrunk_scores(predicted: Sequence[Predicted], rows: Sequence[pd.DataFrame]) -> list[float]:
    """The scores of plans that were run on the same examples, each shrunk towards its prediction.

    The highest of several measured scores is too high: part of it is luck. The mean difference between measured scores
    and predictions is due to the examples, and decides nothing. What remains of a plan's difference is partly true, as
    far as predictions are uncertain or disagree with measured scores, and partly noise, as far as paired differences
    between plans are uncertain.
    """
    expected = np.array([one.score for one in predicted])
    errors = np.array([float(frame["score"].mean()) for frame in rows]) - expected
    middle = float(errors.mean())
    scores = pd.concat([frame.set_index("example")["score"] for frame in rows], axis=1).dropna()
    clusters = rows[0].set_index("example")["cluster"].reindex(scores.index)
    noise = np.array([
        paired_difference(scores.iloc[:, i], scores.mean(axis=1), clusters).se ** 2 for i in range(len(rows))
    ])  # fmt: skip
    noise = np.where(np.isfinite(noise), noise, 0.0)
    uncertain = float(np.mean([((one.high - one.low) / (2 * Z95)) ** 2 for one in predicted]))
    if len(rows) > 1:
        # a scatter beyond the quantile is rare by chance, even of few plans: then predictions are too certain
        spread, limit = float(np.var(errors, ddof=1)), chi2.ppf(TOO_CERTAIN, len(rows) - 1) / (len(rows) - 1)
        if spread > limit * (uncertain + float(noise.mean())):
            uncertain = spread
    true_share = uncertain / np.maximum(uncertain + noise, 1e-18)
    return list(expected + middle + true_share * (errors - middle))
