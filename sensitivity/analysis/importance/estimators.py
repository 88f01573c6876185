"""ESTIMATORS: how much of a forest's picture of the scores each component accounts for, one function per answer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import optuna
from optuna.distributions import IntDistribution
from optuna.importance import BaseImportanceEvaluator, FanovaImportanceEvaluator, PedAnovaImportanceEvaluator
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold

from sensitivity.analysis.importance import tree_shap
from sensitivity.spec import threads

Floats = np.ndarray
Given = TypeVar("Given")
Found = TypeVar("Found")
TREES = 100
REPEATS = 50  # of every permutation
FEW_REPEATS = 10  # in a resample
MANY = 1000  # trials beyond which the forests that only say how sure a ranking is have half the trees
EXPLAINED = 60  # rows that SHAP explains where the grid is too large for the exact table
FEW = 10  # of them in a resample
SHUFFLED = 500  # rows that are shuffled at most in a resample
FANOVA_TREES = 32
FANOVA = 400  # trials that Optuna's fANOVA is given at most: its time grows faster than their number


@dataclass(frozen=True)
class Fitted:
    """A forest and the rows it learned from; `groups` says which columns make one component."""

    forest: RandomForestRegressor
    x: Floats
    y: Floats
    groups: tuple[tuple[int, ...], ...]
    seed: int
    explained: int = EXPLAINED

    @cached_property
    def shap(self) -> tuple[Floats, Floats]:
        """Shapley values, a row per explained plan and a column per feature; and how many trials each plan had."""
        plans, weight = np.unique(self.x, axis=0, return_counts=True)
        if tree_shap.fits(plans):
            return tree_shap.ShapleyTable(self.forest, plans).values(), weight
        if len(plans) > self.explained:
            rows = np.random.default_rng(self.seed).choice(len(plans), self.explained, replace=False)
            plans, weight = plans[rows], weight[rows]
        return tree_shap.Leaves(self.forest, plans).values(), weight

    @cached_property
    def shap_pairs(self) -> tuple[Floats, Floats, Floats]:
        """Shapley interaction values, how many trials each plan had, and the plans."""
        plans, weight = np.unique(self.x, axis=0, return_counts=True)
        if tree_shap.fits(plans):
            return tree_shap.ShapleyTable(self.forest, plans).interactions(), weight, plans
        few = min(self.explained // 4, 10_000 // plans.shape[1] ** 2)  # the cost grows with the square
        if len(plans) > few:
            rows = np.random.default_rng(self.seed).choice(len(plans), few, replace=False)
            plans, weight = plans[rows], weight[rows]
        small = forest_of(self.seed, 20).fit(self.x, self.y)
        return tree_shap.Leaves(small, plans).interactions(), weight, plans


def fit(
    x: Floats,
    y: Floats,
    groups: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    explained: int = EXPLAINED,
    trees: int = TREES,
) -> Fitted:
    groups = tuple((i,) for i in range(x.shape[1])) if groups is None else tuple(tuple(group) for group in groups)
    return Fitted(forest_of(seed, trees).fit(x, y), x, y, groups, seed, explained)


def spared(trees: int, trials: int) -> int:
    """Trees of a forest that is grown many times: half where trials are many."""
    return trees if trials <= MANY else trees // 2


def forest_of(seed: int, trees: int = TREES) -> RandomForestRegressor:
    return RandomForestRegressor(trees, random_state=seed, n_jobs=1)


def forest(fitted: Fitted) -> Floats:
    """How much the splits on a component lower the squared error, as the forest grows."""
    return _together(fitted, fitted.forest.feature_importances_)


def permutation(fitted: Fitted) -> Floats:
    """How much R2 is lost when a component's widths are shuffled among the trials (mean of 50 shuffles)."""
    draw = np.random.default_rng(fitted.seed)
    x, y = fitted.x, fitted.y
    if fitted.explained < EXPLAINED and len(x) > SHUFFLED:
        rows = draw.choice(len(x), SHUFFLED, replace=False)
        x, y = x[rows], y[rows]
    repeats = REPEATS if fitted.explained >= EXPLAINED else FEW_REPEATS
    shuffles = np.stack([draw.permutation(len(x)) for _ in range(repeats)])
    base = r2_score(y, fitted.forest.predict(x))
    spread = np.sum((y - y.mean()) ** 2)
    lost = []
    for group in fitted.groups:
        columns = list(group)
        shuffled = np.repeat(x[None], repeats, axis=0)
        shuffled[:, :, columns] = x[shuffles][:, :, columns]
        predicted = _predict(fitted.forest, shuffled.reshape(-1, x.shape[1])).reshape(repeats, -1)
        scores = 1 - np.sum((y - predicted) ** 2, axis=1) / spread
        lost.append(base - scores.mean())
    return np.asarray(lost)


def _predict(forest: RandomForestRegressor, x: Floats) -> Floats:
    """Predictions that ask the forest once per different row: shuffled trials repeat each other."""
    code = np.zeros(len(x), dtype=np.int64)
    for column in x.T:
        values, place = np.unique(column, return_inverse=True)
        if len(values) > 1 and code.max() > np.iinfo(np.int64).max // len(values):
            _, code = np.unique(code, return_inverse=True)
        code = code * len(values) + place
    _, first, back = np.unique(code, return_index=True, return_inverse=True)
    return np.asarray(forest.predict(x[first])[back])


def shap(fitted: Fitted) -> Floats:
    """Mean absolute Shapley value of a component over the trials (TreeSHAP)."""
    values, weight = fitted.shap
    together = np.column_stack([values[:, list(group)].sum(axis=1) for group in fitted.groups])
    return np.asarray(np.average(np.abs(together), axis=0, weights=weight))


def fanova(fitted: Fitted) -> Floats:
    """Optuna's fANOVA: the share of the variance that a component's main effect explains."""
    if len(fitted.x) > FANOVA:
        rows = np.random.default_rng(fitted.seed).choice(len(fitted.x), FANOVA, replace=False)
        fitted = replace(fitted, x=fitted.x[rows], y=fitted.y[rows])
    return _optuna(fitted, FanovaImportanceEvaluator(n_trees=FANOVA_TREES, seed=fitted.seed))


def ped_anova(fitted: Fitted) -> Floats:
    """Optuna's PED-ANOVA: how much the best tenth of the trials differ from the rest in a component's widths."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _optuna(fitted, PedAnovaImportanceEvaluator())


def _optuna(fitted: Fitted, evaluator: BaseImportanceEvaluator) -> Floats:
    """Optuna's estimators want a study of its own; levels are numbered so that 8 -> 16 is one step like 3 -> 4."""
    study = optuna.create_study(direction="maximize")
    places = [np.unique(column, return_inverse=True) for column in fitted.x.T]
    varied = {f"x{i}": place for i, (values, place) in enumerate(places) if len(values) > 1}
    space = {name: IntDistribution(0, int(place.max())) for name, place in varied.items()}
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={name: int(place[row]) for name, place in varied.items()},
                distributions=dict(space),
                value=float(y),
            )
            for row, y in enumerate(fitted.y)
        ]
    )
    raw = np.full(fitted.x.shape[1], np.nan)
    with contextlib.suppress(ValueError, RuntimeError, ZeroDivisionError):  # it cannot tell: the column stays empty
        found = evaluator.evaluate(study)
        raw = np.array([found.get(f"x{i}", 0.0) for i in range(fitted.x.shape[1])])
    return _together(fitted, raw)


def _together(fitted: Fitted, raw: Floats) -> Floats:
    return np.array([raw[list(group)].sum() for group in fitted.groups])


ESTIMATORS: dict[str, Callable[[Fitted], Floats]] = {
    "forest": forest,
    "permutation": permutation,
    "shap": shap,
    "fanova": fanova,
    "ped_anova": ped_anova,
}
CONSENSUS = ("forest", "permutation", "shap")  # the published consensus is the mean of these three


def shares(raw: Floats) -> Floats:
    """Normalized to 100 %; what an estimator finds negative (shuffling helped, by chance) counts as nothing."""
    positive = np.maximum(raw, 0)
    total = positive.sum()
    return np.asarray(100 * positive / total) if total > 0 else np.full(len(raw), 100 / len(raw))


def consensus(fitted: Fitted) -> Floats:
    return np.asarray(np.mean([shares(ESTIMATORS[name](fitted)) for name in CONSENSUS], axis=0))


def chance(x: Floats, y: Floats, least: int, seed: int = 0, probes: int = 5) -> dict[str, float]:
    """The most that a component without any influence gets in a few resamples, by each estimator.

    Found by shuffling the least important column and resampling the trials: the forest then explains noise with it, as
    much as such a table allows.
    """

    def once(number: int) -> list[float]:
        draw = np.random.default_rng([seed, number])
        shuffled = x.copy()
        shuffled[:, least] = draw.permutation(x[:, least])  # before resampling: drawn twice, a trial stays one trial
        rows = draw.integers(0, len(x), len(x))
        fitted = fit(shuffled[rows], y[rows], seed=number, explained=FEW, trees=spared(50, len(x)))
        return [float(shares(ESTIMATORS[name](fitted))[least]) for name in CONSENSUS]

    most = np.max(side_by_side(once, range(probes)), axis=0)
    return {"consensus": float(most.mean()), **dict(zip(CONSENSUS, most.tolist(), strict=True))}


def side_by_side(once: Callable[[Given], Found], given: Iterable[Given]) -> list[Found]:
    """The same for each, in their order, on all cores: trees grow without Python's lock.

    scikit-learn resets the process's warning filters in every thread; they are put back at the end.
    """
    with warnings.catch_warnings(record=True), ThreadPoolExecutor(threads.limited() or threads.cores()) as pool:
        warnings.simplefilter("ignore")
        return list(pool.map(once, given))


def cross_validated(x: Floats, y: Floats, keys: Sequence[str], seed: int = 0) -> float:
    """R2 of the forest on plans it has not seen: five folds, replicates of a plan in the same fold."""
    folds = min(5, len(set(keys)))
    split = GroupKFold(folds, shuffle=True, random_state=seed)

    def fold(rows: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
        known, unseen = rows
        return unseen, forest_of(seed, spared(TREES, len(x))).fit(x[known], y[known]).predict(x[unseen])

    predicted = np.empty(len(y))
    for unseen, values in side_by_side(fold, split.split(x, y, groups=list(keys))):
        predicted[unseen] = values
    return float(r2_score(y, predicted))


def linear(x: Floats, y: Floats) -> float:
    """R2 of a straight line through the bits, the fit that published tables quote."""
    return float(LinearRegression().fit(x, y).score(x, y))
