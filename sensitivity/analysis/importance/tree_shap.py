"""Exact TreeSHAP of a forest, the values of shap.TreeExplainer; on a small grid of levels from a table of its cells."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestRegressor

CELLS = 40_000  # grids with more cells (each feature's levels and 'unknown' multiplied) have no table
ROOM = 4_000_000  # numbers that a leaf-by-leaf computation handles at once


def levels(x: np.ndarray) -> list[np.ndarray]:
    return [np.unique(column) for column in x.T]


def fits(x: np.ndarray) -> bool:
    """Whether the grid that spans these rows is small enough for a table of all its cells."""
    return x.shape[1] <= 6 and math.prod(len(values) + 1 for values in levels(x)) <= CELLS


class ShapleyTable:
    """For every set S of features, the forest's expectation given the features in S, over the grid of their levels.

    A leaf is a box: per feature an interval, and the share of the training rows that took this branch wherever the
    path split on that feature. Path-dependent TreeSHAP multiplies, over features, 'is inside the interval' for known
    features and that share for unknown ones. Both are sums of products over leaves, hence matrix products.
    """

    def __init__(self, forest: RandomForestRegressor, x: np.ndarray) -> None:
        self.grid = levels(x)
        self.index = np.column_stack([np.searchsorted(g, c) for g, c in zip(self.grid, x.T, strict=True)])
        value, inside, share = _boxes(forest, self.grid)
        features = range(x.shape[1])
        self.known = {
            subset: _sum_of_products(value, [inside[f] if f in subset else share[:, f, None] for f in features])
            for size in range(x.shape[1] + 1)
            for subset in itertools.combinations(features, size)
        }

    def at(self, subset: tuple[int, ...]) -> np.ndarray:
        """The expectation given the features of a set, for every row."""
        cells = tuple(self.index[:, f] if f in subset else 0 for f in range(self.index.shape[1]))
        found = np.broadcast_to(self.known[subset][cells], len(self.index))
        return np.asarray(found)

    def values(self) -> np.ndarray:
        """Shapley values, one row per row and one column per feature."""
        features = self.index.shape[1]
        out = np.zeros(self.index.shape)
        for f in range(features):
            others = [g for g in range(features) if g != f]
            for size in range(features):
                weight = 1 / (features * math.comb(features - 1, size))
                for subset in itertools.combinations(others, size):
                    joined = tuple(sorted((*subset, f)))
                    out[:, f] += weight * (self.at(joined) - self.at(subset))
        return out

    def interactions(self) -> np.ndarray:
        """Shapley interaction values as shap defines them: halves off the diagonal, rows sum to the Shapley values."""
        features = self.index.shape[1]
        out = np.zeros((len(self.index), features, features))
        for f, g in itertools.combinations(range(features), 2):
            others = [h for h in range(features) if h not in (f, g)]
            for size in range(features - 1):
                weight = 1 / (2 * (features - 1) * math.comb(features - 2, size))
                for subset in itertools.combinations(others, size):
                    both, one, two = (tuple(sorted((*subset, *extra))) for extra in ((f, g), (f,), (g,)))
                    out[:, f, g] += weight * (self.at(both) - self.at(one) - self.at(two) + self.at(subset))
            out[:, g, f] = out[:, f, g]
        own = np.arange(features)
        out[:, own, own] = self.values() - out.sum(axis=2)
        return out


class Leaves:
    """The same values where the grid is too large for a table: leaf by leaf.

    A leaf's game is a product over features of a (1 where the row lies inside its interval, else 0) for known features
    and b (the share of rows) for unknown ones. Weighing a set of s of n - 1 others by s! (n - 1 - s)! / n! is
    integrating t^s (1 - t)^(n - 1 - s), so that feature f's value is (a_f - b_f) times the integral of the product over
    the others of t a + (1 - t) b: a polynomial, which Gauss and Legendre's rule integrates exactly.
    """

    def __init__(self, forest: RandomForestRegressor, x: np.ndarray) -> None:
        self.grid = levels(x)
        self.index = np.column_stack([np.searchsorted(g, c) for g, c in zip(self.grid, x.T, strict=True)])
        self.value, self.inside, self.share = _boxes(forest, self.grid)
        longest = int(((self.share < 1).sum(axis=1)).max(initial=1))  # features that some path splits on
        nodes, weights = np.polynomial.legendre.leggauss(longest // 2 + 1)
        self.nodes, self.weights = (nodes + 1) / 2, weights / 2

    def values(self) -> np.ndarray:
        """Shapley values, one row per row and one column per feature."""
        return np.concatenate([self._of(rows, pairs=False) for rows in self._portions()])

    def interactions(self) -> np.ndarray:
        """Shapley interaction values as shap defines them: halves off the diagonal, rows sum to the Shapley values."""
        out = np.concatenate([self._of(rows, pairs=True) for rows in self._portions()])
        own = np.arange(out.shape[1])
        out[:, own, own] = self.values() - out.sum(axis=2)
        return out

    def _portions(self) -> list[np.ndarray]:
        most = max(1, ROOM // max(self.share.size, 1))
        return [self.index[i : i + most] for i in range(0, len(self.index), most)]

    def _of(self, rows: np.ndarray, pairs: bool) -> np.ndarray:
        features = rows.shape[1]
        known = np.stack([self.inside[f][:, rows[:, f]].T for f in range(features)]).astype(float)  # feature, row, leaf
        unknown = self.share.T[:, None, :]
        out = np.zeros((len(rows), features, features) if pairs else (len(rows), features))
        for t, weight in zip(self.nodes, self.weights, strict=True):
            mixed = t * known + (1 - t) * unknown  # never 0: a share is not, and no node lies at the end
            whole = weight * self.value * mixed.prod(axis=0)
            gain = (known - unknown) / mixed
            if not pairs:
                out += (gain * whole).sum(axis=2).T
                continue
            for f, g in itertools.combinations(range(features), 2):
                out[:, f, g] += (gain[f] * gain[g] * whole).sum(axis=1) / 2
                out[:, g, f] = out[:, f, g]
        return out


def _boxes(forest: RandomForestRegressor, grid: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Leaf values, per feature which levels lie inside (leaves x levels), and the share of rows (leaves x features).

    The trees are laid side by side and walked together, one depth at a time.
    """
    trees = [estimator.tree_ for estimator in forest.estimators_]
    start = np.cumsum([0, *(tree.node_count for tree in trees)])
    left = np.concatenate([np.where(t.children_left < 0, -1, t.children_left + s) for t, s in _zip(trees, start)])
    right = np.concatenate([np.where(t.children_right < 0, -1, t.children_right + s) for t, s in _zip(trees, start)])
    feature, threshold, cover, value = (
        np.concatenate([getattr(tree, name).reshape(tree.node_count) for tree in trees])
        for name in ("feature", "threshold", "weighted_n_node_samples", "value")
    )
    share = np.ones((len(left), len(grid)))
    inside = [np.ones((len(left), len(values)), dtype=bool) for values in grid]
    frontier = start[:-1]
    while len(frontier := frontier[left[frontier] >= 0]):
        for children, goes_left in ((left, True), (right, False)):
            child = children[frontier]
            share[child] = share[frontier]
            share[child, feature[frontier]] *= cover[child] / cover[frontier]
            for f, values in enumerate(grid):
                inside[f][child] = inside[f][frontier]
                mine = feature[frontier] == f
                stays = values.astype(np.float32) <= threshold[frontier[mine], None]  # sklearn compares in float32
                inside[f][child[mine]] &= stays if goes_left else ~stays
        frontier = np.concatenate([left[frontier], right[frontier]])
    leaves = left < 0
    return value[leaves] / len(trees), [i[leaves] for i in inside], share[leaves]


def _zip(trees: list[Any], start: np.ndarray) -> Iterable[tuple[Any, int]]:
    return zip(trees, start[:-1], strict=True)


def _sum_of_products(value: np.ndarray, factors: list[np.ndarray]) -> np.ndarray:
    """Sum over leaves of value times the outer product of one row of each factor."""
    half = (len(factors) + 1) // 2
    left, right = value[:, None], np.ones((len(value), 1))
    for factor in factors[:half]:
        left = (left[:, :, None] * factor[:, None, :]).reshape(len(value), -1)
    for factor in factors[half:]:
        right = (right[:, :, None] * factor[:, None, :]).reshape(len(value), -1)
    return np.asarray((left.T @ right).reshape([factor.shape[1] for factor in factors]))
