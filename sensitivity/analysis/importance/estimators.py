"""ESTIMATORS: functions that compute the importance of each component from a random forest that predicts the score."""

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
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold

from sensitivity.analysis.importance import tree_shap
from sensitivity.analysis.importance.random_forest import RandomForest
from sensitivity.spec import threads

Floats = np.ndarray
Given = TypeVar("Given")
Found = TypeVar("Found")
TREES = 100
REPEATS = 50  # shuffles of each component in permutation importance
FEW_REPEATS = 10  # shuffles in a bootstrap resample
MANY_TRIALS = 1000  # beyond, forests that serve only intervals and checks have half the trees
# trials from which threads pay off: two took 1.6 times as long as one at 65 trials, as long at 250, half at 1,500
MIN_TRIALS_FOR_THREADS = 300
SHAP_PLANS = 60  # plans that SHAP explains where the grid is too large for the table of all cells
PAIR_TREES = 20  # of the forest, for the interactions of pairs on such grids
FEW_SHAP_PLANS = 10  # plans in a bootstrap resample
SHUFFLED = 500  # most trials that permutation importance uses in a bootstrap resample
FANOVA_TREES = 32
FANOVA = 400  # trials that Optuna's fANOVA is given at most: its time grows faster than their number


@dataclass(frozen=True)
class Fitted:
    """A fitted forest and its training data; `groups` says which columns of x make up each component."""

    forest: RandomForest
    x: Floats
    y: Floats
    groups: tuple[tuple[int, ...], ...]
    seed: int
    shap_plans: int = (
        SHAP_PLANS  # plans that SHAP explains; fewer mark a resample, in which permutation is cheaper, too
    )

    @cached_property
    def shap(self) -> tuple[Floats, Floats]:
        """SHAP values, explained plans x features, and the number of trials of each of those plans."""
        # each distinct plan once: its replicates have the same values, and count by their number
        plans, weight = np.unique(self.x, axis=0, return_counts=True)
        if tree_shap.fits(plans):
            return tree_shap.ShapleyTable(self.forest, plans).values(), weight
        if len(plans) > self.shap_plans:
            rows = np.random.default_rng(self.seed).choice(len(plans), self.shap_plans, replace=False)
            plans, weight = plans[rows], weight[rows]
        return tree_shap.Leaves(self.forest, plans).values(), weight

    @cached_property
    def shap_pairs(self) -> tuple[Floats, Floats, Floats]:
        """SHAP interaction values, plans x features x features; the number of trials of each plan; and the plans.

        On a grid too large for the table of all cells, they are those of a few plans and of the forest's first trees.
        """
        plans, weight = np.unique(self.x, axis=0, return_counts=True)
        if tree_shap.fits(plans):
            return tree_shap.ShapleyTable(self.forest, plans).interactions(), weight, plans
        few = min(self.shap_plans // 4, 10_000 // plans.shape[1] ** 2)  # the cost grows with the square of features
        if len(plans) > few:
            rows = np.random.default_rng(self.seed).choice(len(plans), few, replace=False)
            plans, weight = plans[rows], weight[rows]
        return tree_shap.Leaves(self.forest.first(PAIR_TREES), plans).interactions(), weight, plans


def fit(
    x: Floats,
    y: Floats,
    groups: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    shap_plans: int = SHAP_PLANS,
    trees: int = TREES,
) -> Fitted:
    """Fit a forest that predicts scores y from bits x; without `groups`, each column is a component."""
    groups = tuple((i,) for i in range(x.shape[1])) if groups is None else tuple(tuple(group) for group in groups)
    return Fitted(RandomForest(trees, seed).fit(x, y), x, y, groups, seed, shap_plans)


def tree_count(trees: int, trials: int) -> int:
    """Number of trees of a forest that is grown many times: half as many where there are many trials."""
    return trees if trials <= MANY_TRIALS else trees // 2


def forest(fitted: Fitted) -> Floats:
    """Impurity importance: how much the splits on a component lower the squared error while the forest is grown."""
    return _by_component(fitted, fitted.forest.feature_importances_)


def permutation(fitted: Fitted) -> Floats:
    """Permutation importance: how much R2 falls when a component's widths are shuffled among trials (50 times)."""
    draw = np.random.default_rng(fitted.seed)
    x, y = fitted.x, fitted.y
    if fitted.shap_plans < SHAP_PLANS and len(x) > SHUFFLED:
        rows = draw.choice(len(x), SHUFFLED, replace=False)
        x, y = x[rows], y[rows]
    repeats = REPEATS if fitted.shap_plans >= SHAP_PLANS else FEW_REPEATS
    # the same shuffles for every component, so that components do not differ by the luck of the draw
    shuffles = np.stack([draw.permutation(len(x)) for _ in range(repeats)])
    base = r2_score(y, fitted.forest.predict(x))
    total = np.sum((y - y.mean()) ** 2)
    lost = []
    for group in fitted.groups:
        columns = list(group)
        shuffled = np.repeat(x[None], repeats, axis=0)
        shuffled[:, :, columns] = x[shuffles][:, :, columns]
        predicted = _predict(fitted.forest, shuffled.reshape(-1, x.shape[1])).reshape(repeats, -1)
        scores = 1 - np.sum((y - predicted) ** 2, axis=1) / total
        lost.append(base - scores.mean())
    return np.asarray(lost)


def _predict(forest: RandomForest, x: Floats) -> Floats:
    """Predictions for rows of which each distinct one is predicted once: shuffled trials repeat each other often."""
    # each row becomes one integer whose digits are its columns; renumbered where the next digit would overflow it
    code = np.zeros(len(x), dtype=np.int64)
    for column in x.T:
        values, place = np.unique(column, return_inverse=True)
        if len(values) > 1 and code.max() > np.iinfo(np.int64).max // len(values):
            _, code = np.unique(code, return_inverse=True)
        code = code * len(values) + place
    _, first, back = np.unique(code, return_index=True, return_inverse=True)
    return np.asarray(forest.predict(x[first])[back])


def shap(fitted: Fitted) -> Floats:
    """Mean absolute SHAP value of a component over the trials (TreeSHAP)."""
    values, weight = fitted.shap
    # a component's columns are added before the absolute value: effects that cancel are no effect
    summed = np.column_stack([values[:, list(group)].sum(axis=1) for group in fitted.groups])
    return np.asarray(np.average(np.abs(summed), axis=0, weights=weight))


def fanova(fitted: Fitted) -> Floats:
    """Optuna's fANOVA: the share of the variance that a component's main effect explains."""
    if len(fitted.x) > FANOVA:
        rows = np.random.default_rng(fitted.seed).choice(len(fitted.x), FANOVA, replace=False)
        fitted = replace(fitted, x=fitted.x[rows], y=fitted.y[rows])
    return _optuna(fitted, FanovaImportanceEvaluator(n_trees=FANOVA_TREES, seed=fitted.seed))


def ped_anova(fitted: Fitted) -> Floats:
    """Optuna's PED-ANOVA: how much a component's widths in the best tenth of the trials differ from all trials'."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _optuna(fitted, PedAnovaImportanceEvaluator())


def _optuna(fitted: Fitted, evaluator: BaseImportanceEvaluator) -> Floats:
    """Run an evaluator of Optuna on a study in memory; widths are numbered, so that 8 to 16 is one step like 3 to 4."""
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
    with contextlib.suppress(ValueError, RuntimeError, ZeroDivisionError):  # the evaluator rejects these data: NaN
        importances = evaluator.evaluate(study)
        raw = np.array([importances.get(f"x{i}", 0.0) for i in range(fitted.x.shape[1])])
    return _by_component(fitted, raw)


def _by_component(fitted: Fitted, raw: Floats) -> Floats:
    """Values of columns, summed over the columns of each component."""
    return np.array([raw[list(group)].sum() for group in fitted.groups])


ESTIMATORS: dict[str, Callable[[Fitted], Floats]] = {
    "forest": forest,
    "permutation": permutation,
    "shap": shap,
    "fanova": fanova,
    "ped_anova": ped_anova,
}
CONSENSUS = ("forest", "permutation", "shap")  # the consensus of published studies is the mean of these three


def shares(raw: Floats) -> Floats:
    """Values as percent of their sum; a negative one (shuffling happened to help) counts as 0."""
    positive = np.maximum(raw, 0)
    total = positive.sum()
    return np.asarray(100 * positive / total) if total > 0 else np.full(len(raw), 100 / len(raw))


def consensus(fitted: Fitted) -> Floats:
    """Mean share of each component over the estimators of CONSENSUS."""
    return np.asarray(np.mean([shares(ESTIMATORS[name](fitted)) for name in CONSENSUS], axis=0))


def chance(x: Floats, y: Floats, least: int, seed: int = 0, probes: int = 5) -> dict[str, float]:
    """The largest share that each estimator gives, in a few resamples, to a component that has no influence.

    Such a component is made by shuffling the least important column. Whatever share it still gets is due to noise,
    which a forest fits with any column, the more so the fewer trials there are.
    """

    def once(number: int) -> list[float]:
        draw = np.random.default_rng([seed, number])
        shuffled = x.copy()
        shuffled[:, least] = draw.permutation(x[:, least])  # before resampling, so that copies of a trial stay equal
        rows = draw.integers(0, len(x), len(x))
        fitted = fit(shuffled[rows], y[rows], seed=number, shap_plans=FEW_SHAP_PLANS, trees=tree_count(50, len(x)))
        return [float(shares(ESTIMATORS[name](fitted))[least]) for name in CONSENSUS]

    largest = np.max(map_in_threads(once, range(probes), len(x)), axis=0)
    return {"consensus": float(largest.mean()), **dict(zip(CONSENSUS, largest.tolist(), strict=True))}


def map_in_threads(once: Callable[[Given], Found], given: Iterable[Given], trials: int) -> list[Found]:
    """Apply a function to each item, results in order; in threads if there are enough trials for them to pay off.

    Trees grow without Python's lock, so threads suffice; with small trees, they mostly wait for the lock.

    scikit-learn resets the process's warning filters in every thread; they are restored at the end.
    """
    cores = (threads.requested() or threads.cores()) if trials >= MIN_TRIALS_FOR_THREADS else 1
    with warnings.catch_warnings(record=True), ThreadPoolExecutor(cores) as pool:
        warnings.simplefilter("ignore")
        return list(pool.map(once, given))


def cross_validated(x: Floats, y: Floats, keys: Sequence[str], seed: int = 0) -> float:
    """R2 of the forest on plans it has not seen: five folds, replicates of a plan in the same fold."""
    folds = min(5, len(set(keys)))
    split = GroupKFold(folds, shuffle=True, random_state=seed)

    def fold(rows: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
        seen, unseen = rows
        return unseen, RandomForest(tree_count(TREES, len(x)), seed).fit(x[seen], y[seen]).predict(x[unseen])

    predicted = np.empty(len(y))
    for unseen, values in map_in_threads(fold, split.split(x, y, groups=list(keys)), len(x)):
        predicted[unseen] = values
    return float(r2_score(y, predicted))


def linear(x: Floats, y: Floats) -> float:
    """R2 of a linear regression on the bits, the fit that published tables quote."""
    return float(LinearRegression().fit(x, y).score(x, y))
