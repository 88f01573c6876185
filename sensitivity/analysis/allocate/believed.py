"""Believed scores: the reading of each measured plan, drawn towards the surrogate by as much as it is noise."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.observations import observations_of
from sensitivity.study.study import Study


def believed(study: Study, knapsack: Knapsack, weights: Mapping[str, float]) -> dict[str, float]:
    """For each measured plan, by key, its weighted mean share of full precision.

    The best of several noisy readings is too high (the winner's curse). A plan's reading is its prediction, plus what
    the surrogate misses, plus noise. With variances m of what is missed and n of the noise, a plan is believed to score
    its prediction plus m / (m + n) of the distance from there to its reading.
    """
    shares: dict[str, float] = {}
    total = sum(weights.values())
    for task, weight in weights.items():
        observations, model = observations_of(study, task), knapsack.models[task]
        predicted = model.predict(knapsack.space.encode(observations.plans))
        noise = (observations.noise or 0.0) ** 2
        missed = max(model.sigma**2 - noise, 0.0)
        for key, rows in pd.DataFrame({"key": observations.keys}).groupby("key").groups.items():
            reading, expected, variance = observations.score[rows].mean(), predicted[rows].mean(), noise / len(rows)
            kept = missed / (missed + variance) if missed + variance > 0 else 1.0
            score = (expected + kept * (reading - expected)) / (knapsack.full(task) or 1.0)
            shares[str(key)] = shares.get(str(key), 0.0) + weight / total * float(score)
    return {key: score for key, score in shares.items() if np.isfinite(score)}
