"""Seconds of SHAP values by our own code and by shap's TreeExplainer, for forests as a ranking fits them.

    python -m experiments.benchmarks.tree_shap

A ranking with 100 resamples needs the values of about a hundred forests. The first grid fits in a table of all cells,
the second is computed leaf by leaf. Both give the values of shap, as the tests show, too. CPU seconds, the best of
three runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import shap
from sklearn.ensemble import RandomForestRegressor

from sensitivity.analysis.importance import tree_shap
from sensitivity.analysis.importance.estimators import SHAP_PLANS, TREES

LEVELS = (2, 3, 4, 6, 8, 16)
TRIALS = 448


def seconds(run: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """CPU seconds of the fastest of three runs, and the result."""
    took = []
    for _ in range(3):
        began = time.process_time()
        values = run()
        took.append(time.process_time() - began)
    return min(took), values


def compare(forest: RandomForestRegressor, plans: np.ndarray, components: int) -> None:
    """Print a row for the values and one for the interaction values, after a check that both codes agree."""
    explainer = shap.TreeExplainer(forest)
    ours = tree_shap.ShapleyTable if tree_shap.fits(plans) else tree_shap.Leaves
    for what, theirs, mine in (
        ("values", explainer.shap_values, ours.values),
        ("interactions", explainer.shap_interaction_values, ours.interactions),
    ):
        slow, expected = seconds(partial(theirs, plans))
        fast, values = seconds(partial(lambda method: method(ours(forest, plans)), mine))
        np.testing.assert_allclose(values, expected, atol=1e-6)
        print(f"| {components} | {len(plans)} | {what} | {slow:.3f} | {fast:.3f} | {slow / fast:.1f} |", flush=True)


def main() -> None:
    draw = np.random.default_rng(0)
    print("| components | plans | what | shap, s | here, s | times faster |\n|---|---|---|---|---|---|")
    for components in (3, 12):
        bits = draw.choice(LEVELS, (TRIALS, components)).astype(float)
        score = 1 - np.exp(1 - bits).sum(axis=1) / components + 0.01 * draw.standard_normal(TRIALS)
        plans = np.unique(bits, axis=0)
        if not tree_shap.fits(plans):  # then a ranking explains some plans only
            plans = plans[draw.choice(len(plans), SHAP_PLANS, replace=False)]
        compare(RandomForestRegressor(TREES, random_state=0).fit(bits, score), plans, components)


if __name__ == "__main__":
    main()
