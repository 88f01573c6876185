"""Exact TreeSHAP values of a forest, equal to shap.TreeExplainer's: from a table on small grids, else by leaf."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from sklearn.tree import DecisionTreeRegressor

# Written by hand for the few components of most studies, whose ranking explains a hundred forests: the table takes a
# twelfth of the CPU seconds of shap's TreeExplainer for the values of 185 plans, and a 55th for their interactions.
# Leaf by leaf, interactions of 60 plans of 12 components take a third, but their values twice as long (1.5 against
# 0.7 s): python -m experiments.benchmarks.tree_shap. So shap need not be installed, nor the compiler it needs.
CELLS = 40_000  # most cells of a table: the product, over features, of its number of levels plus one for 'unknown'
MAX_ENTRIES = 4_000_000  # of an array of rows x leaves x features


class Tree(Protocol):
    """The part of scikit-learn's trees that is used: arrays over the nodes of a tree; a leaf's children are -1."""

    node_count: int
    children_left: np.ndarray
    children_right: np.ndarray


class Forest(Protocol):
    """The part of a fitted forest, ours or scikit-learn's, that is used."""

    estimators_: list[DecisionTreeRegressor]


def distinct_values(x: np.ndarray) -> list[np.ndarray]:
    """The distinct values of each feature."""
    return [np.unique(column) for column in x.T]


def fits(x: np.ndarray) -> bool:
    """Whether the grid of these rows' levels is small enough for a table of all its cells."""
    return x.shape[1] <= 6 and math.prod(len(values) + 1 for values in distinct_values(x)) <= CELLS


class ShapleyTable:
    """For every set S of features, the forest's expected output given the features in S, at every cell of the grid.

    A leaf is a box: per feature, an interval, and the share of training rows that took this branch wherever the path
    splits on that feature. Path-dependent TreeSHAP weighs a leaf by a product over features: whether the value lies
    in the interval (1 or 0) for features in S, that share for all others. The expectation is thus a sum over leaves
    of products over features, which matrix products compute for all cells at once.
    """

    def __init__(self, forest: Forest, x: np.ndarray) -> None:
        self.grid = distinct_values(x)
        self.index = np.column_stack([np.searchsorted(g, c) for g, c in zip(self.grid, x.T, strict=True)])
        value, inside, share = _boxes(forest, self.grid)
        features = range(x.shape[1])
        self.expected = {
            subset: _sum_of_products(value, [inside[f] if f in subset else share[:, f, None] for f in features])
            for size in range(x.shape[1] + 1)
            for subset in itertools.combinations(features, size)
        }

    def at(self, subset: tuple[int, ...]) -> np.ndarray:
        """The expected output given the features of a set, for every row."""
        cells = tuple(self.index[:, f] if f in subset else 0 for f in range(self.index.shape[1]))
        return np.asarray(np.broadcast_to(self.expected[subset][cells], len(self.index)))

    def values(self) -> np.ndarray:
        """SHAP values, rows x features."""
        features = self.index.shape[1]
        out = np.zeros(self.index.shape)
        for f in range(features):
            others = [g for g in range(features) if g != f]
            for size in range(features):
                # Shapley's weight of a set of this size: size! (features - 1 - size)! / features!
                weight = 1 / (features * math.comb(features - 1, size))
                for subset in itertools.combinations(others, size):
                    joined = tuple(sorted((*subset, f)))
                    out[:, f] += weight * (self.at(joined) - self.at(subset))
        return out

    def interactions(self) -> np.ndarray:
        """SHAP interaction values, as shap defines them: halves off the diagonal, rows sum to the SHAP values."""
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
        diagonal = np.arange(features)
        out[:, diagonal, diagonal] = self.values() - out.sum(axis=2)
        return out


class Leaves:
    """The same values leaf by leaf, for grids that are too large for a table.

    A leaf contributes its value times a product over features: a (1 if the row lies in the leaf's interval, else 0)
    for features in S, b (the share of training rows) for all others. Shapley's weight of a set of s among n - 1
    others, s! (n - 1 - s)! / n!, is the integral of t^s (1 - t)^(n - 1 - s) over 0 to 1. Summed over all sets, feature
    f's value becomes (a_f - b_f) times the integral of the product, over the other features, of t a + (1 - t) b. That
    is a polynomial in t, and a Gauss-Legendre rule of enough nodes integrates it exactly.
    """

    def __init__(self, forest: Forest, x: np.ndarray) -> None:
        self.grid = distinct_values(x)
        self.index = np.column_stack([np.searchsorted(g, c) for g, c in zip(self.grid, x.T, strict=True)])
        self.value, self.inside, self.share = _boxes(forest, self.grid)
        longest = int(((self.share < 1).sum(axis=1)).max(initial=1))  # features on one path
        # m nodes are exact up to degree 2 m - 1, and the product over the others has degree longest - 1 at most
        nodes, weights = np.polynomial.legendre.leggauss(longest // 2 + 1)
        self.nodes, self.weights = (nodes + 1) / 2, weights / 2

    def values(self) -> np.ndarray:
        """SHAP values, rows x features."""
        return np.concatenate([self._of(rows, pairs=False) for rows in self._portions()])

    def interactions(self) -> np.ndarray:
        """SHAP interaction values, as shap defines them: halves off the diagonal, rows sum to the SHAP values."""
        out = np.concatenate([self._of(rows, pairs=True) for rows in self._portions()])
        diagonal = np.arange(out.shape[1])
        out[:, diagonal, diagonal] = self.values() - out.sum(axis=2)
        return out

    def _portions(self) -> list[np.ndarray]:
        """The rows in batches that keep the arrays of `_of` within MAX_ENTRIES."""
        size = max(1, MAX_ENTRIES // max(self.share.size, 1))
        return [self.index[i : i + size] for i in range(0, len(self.index), size)]

    def _of(self, rows: np.ndarray, pairs: bool) -> np.ndarray:
        """SHAP values of some rows, or their interaction values off the diagonal."""
        features = rows.shape[1]
        # axes: feature, row, leaf
        inside = np.stack([self.inside[f][:, rows[:, f]].T for f in range(features)]).astype(float)
        share = self.share.T[:, None, :]
        out = np.zeros((len(rows), features, features) if pairs else (len(rows), features))
        for t, weight in zip(self.nodes, self.weights, strict=True):
            mixed = t * inside + (1 - t) * share  # above 0, as shares and 1 - t are: it is divided by
            whole = weight * self.value * mixed.prod(axis=0)
            # times `whole`: the product over the other features, with (a - b) in this feature's place
            gain = (inside - share) / mixed
            if not pairs:
                out += (gain * whole).sum(axis=2).T
                continue
            for f, g in itertools.combinations(range(features), 2):
                out[:, f, g] += (gain[f] * gain[g] * whole).sum(axis=1) / 2
                out[:, g, f] = out[:, f, g]
        return out


def _boxes(forest: Forest, grid: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Leaf values, per feature which levels lie inside (leaves x levels), and the share of rows (leaves x features).

    The nodes of all trees stand in one array and are descended together, a depth at a time: no loop over nodes.
    """
    trees = [estimator.tree_ for estimator in forest.estimators_]
    start = np.cumsum([0, *(tree.node_count for tree in trees)])
    placed = list(_with_offsets(trees, start))
    left = np.concatenate([np.where(t.children_left < 0, -1, t.children_left + s) for t, s in placed])
    right = np.concatenate([np.where(t.children_right < 0, -1, t.children_right + s) for t, s in placed])
    feature, threshold, cover, value = (
        np.concatenate([getattr(tree, name).reshape(tree.node_count) for tree in trees])
        for name in ("feature", "threshold", "weighted_n_node_samples", "value")
    )
    share = np.ones((len(left), len(grid)))
    inside = [np.ones((len(left), len(values)), dtype=bool) for values in grid]
    open_nodes = start[:-1]
    while len(open_nodes := open_nodes[left[open_nodes] >= 0]):
        for children, goes_left in ((left, True), (right, False)):
            child = children[open_nodes]
            share[child] = share[open_nodes]
            share[child, feature[open_nodes]] *= cover[child] / cover[open_nodes]
            for f, values in enumerate(grid):
                inside[f][child] = inside[f][open_nodes]
                splits = feature[open_nodes] == f
                stays = values.astype(np.float32) <= threshold[open_nodes[splits], None]  # sklearn compares in float32
                inside[f][child[splits]] &= stays if goes_left else ~stays
        open_nodes = np.concatenate([left[open_nodes], right[open_nodes]])
    leaves = left < 0
    # divided, since a forest is the mean of its trees
    return value[leaves] / len(trees), [i[leaves] for i in inside], share[leaves]


def _with_offsets(trees: list[Tree], start: np.ndarray) -> Iterable[tuple[Tree, int]]:
    """Each tree with the position of its first node."""
    return zip(trees, start[:-1], strict=True)


def _sum_of_products(value: np.ndarray, factors: list[np.ndarray]) -> np.ndarray:
    """Sum over leaves of value times the outer product of the leaf's row in each factor."""
    # half of the factors on either side: the sum over leaves is then a single matrix product
    half = (len(factors) + 1) // 2
    left, right = value[:, None], np.ones((len(value), 1))
    for factor in factors[:half]:
        left = (left[:, :, None] * factor[:, None, :]).reshape(len(value), -1)
    for factor in factors[half:]:
        right = (right[:, :, None] * factor[:, None, :]).reshape(len(value), -1)
    return np.asarray((left.T @ right).reshape([factor.shape[1] for factor in factors]))
