"""A random forest with exactly the numbers of scikit-learn's, without its overhead around each small tree."""

from __future__ import annotations

import numpy as np
from sklearn import config_context
from sklearn.tree import DecisionTreeRegressor

# RandomForestRegressor clones an estimator, checks its parameters and opens a joblib task for every tree. With the
# few hundred trials of a study, that takes most of the time, with Python's lock held, and a ranking grows six thousand
# trees. A test compares the two.


class RandomForest:
    """Regression trees on bootstrap samples; a prediction is their mean."""

    def __init__(self, trees: int, seed: int) -> None:
        self.trees, self.seed = trees, seed
        self.estimators_: list[DecisionTreeRegressor] = []

    def fit(self, x: np.ndarray, y: np.ndarray) -> RandomForest:
        """Grow the trees on finite x and y."""
        draw, rows = np.random.RandomState(self.seed), len(x)
        x32, y = np.ascontiguousarray(x, np.float32), np.asarray(y, np.float64)
        self.estimators_ = []
        with config_context(skip_parameter_validation=True, assume_finite=True):
            for _ in range(self.trees):
                seed = draw.randint(np.iinfo(np.int32).max)
                sample = np.random.RandomState(seed).randint(0, rows, rows, dtype=np.int32)
                times = np.bincount(sample, minlength=rows).astype(np.float64)
                tree = DecisionTreeRegressor(random_state=seed)
                self.estimators_.append(tree.fit(x32, y, sample_weight=times, check_input=False))
        return self

    def first(self, trees: int) -> RandomForest:
        """The forest of the first trees, as if no more had been grown."""
        smaller = RandomForest(trees, self.seed)
        smaller.estimators_ = self.estimators_[:trees]
        return smaller

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The trees' mean, for each row."""
        x32 = np.ascontiguousarray(x, np.float32)
        total = np.zeros(len(x))
        for tree in self.estimators_:
            total += tree.tree_.predict(x32)[:, 0]
        return total / len(self.estimators_)

    @property
    def feature_importances_(self) -> np.ndarray:
        """Impurity importance of each feature, as shares of one; zeros where no tree split."""
        each = [tree.tree_.compute_feature_importances() for tree in self.estimators_ if tree.tree_.node_count > 1]
        if not each:
            return np.zeros(self.estimators_[0].n_features_in_)
        mean = np.mean(each, axis=0)
        return np.asarray(mean / mean.sum())
