"""Studies whose truth is known: three or more components, a formula for the score, noise from a seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from sensitivity.analysis.observations import Observations
from sensitivity.spec.components import ComponentMap, Kept, Weight
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.study import Study

Formula = Callable[[np.ndarray], np.ndarray]
PARTS = ("vision", "connector", "language")
LEVELS = (2, 3, 4, 6, 8, 16)


def parts(names: Sequence[str] = PARTS, sizes: Sequence[int] = (1000, 100, 2500), kept: int = 400) -> ComponentMap:
    weights = tuple(
        Weight(f"{name}.weight", 1, size, name.split(".")[0], None, 0, None)
        for name, size in zip(names, sizes, strict=True)
    )
    return ComponentMap("planted", "linear", weights, (Kept("embedding", kept, "embedding"),))


def plan(names: Sequence[str], bits: Sequence[float]) -> Plan:
    return Plan(
        tuple((name, None if b == 16 else Scheme("codes", int(b))) for name, b in zip(names, bits, strict=True))
    )


def grid(levels: Sequence[int] = LEVELS, width: int = 3) -> np.ndarray:
    return np.array(list(itertools.product(levels, repeat=width)), dtype=float)


def observations(formula: Formula, noise: float = 0.0, seed: int = 0, levels: Sequence[int] = LEVELS) -> Observations:
    bits = grid(levels)
    score = formula(bits) + noise * np.random.default_rng(seed).standard_normal(len(bits))
    unknown = np.full(len(bits), np.nan)
    keys = tuple(str(row) for row in bits)
    return Observations("planted", PARTS, bits, score, unknown, keys, unknown, ("codes",) * len(bits))


def study(
    path: Path,
    formulas: dict[str, Formula],
    noise: float = 0.0,
    levels: Sequence[int] = LEVELS,
    components: ComponentMap | None = None,
    rows: np.ndarray | None = None,
) -> Study:
    components = components or parts()
    bits = grid(levels, len(components.names)) if rows is None else rows
    draw = np.random.default_rng(0)
    scores = {name: formula(bits) + noise * draw.standard_normal(len(bits)) for name, formula in formulas.items()}
    made = Study.create(path, components, list(formulas), {"model": "planted"})
    made.append(
        [plan(components.names, row) for row in bits],
        [{name: float(values[i]) for name, values in scores.items()} for i in range(len(bits))],
    )
    return made


def damage(bits: np.ndarray, half: float) -> np.ndarray:
    """Falls to a third of the quality at `half` bits."""
    return np.asarray(np.exp(-(bits - half)))


def product(bits: np.ndarray) -> np.ndarray:
    """Vision and language matter, the connector hardly; damages multiply."""
    total = damage(bits[:, 0], 3) + damage(bits[:, 1], 0.5) + damage(bits[:, 2], 2.5)
    return np.asarray(np.exp(-total))


def additive(bits: np.ndarray) -> np.ndarray:
    """Vision three times as much as language; the connector is irrelevant."""
    return np.asarray(1 - 0.3 * damage(bits[:, 0], 2) - 0.1 * damage(bits[:, 2], 2))


def tied(bits: np.ndarray) -> np.ndarray:
    """Vision and language alike, the connector a little."""
    return np.asarray(1 - 0.3 * damage(bits[:, 0], 2) - 0.05 * damage(bits[:, 1], 2) - 0.3 * damage(bits[:, 2], 2))


def crossed(bits: np.ndarray) -> np.ndarray:
    """Nothing happens unless both vision and language are low: a pure interaction."""
    return np.asarray(1 - 0.8 * (bits[:, 0] <= 3) * (bits[:, 2] <= 3))


def frame(right: float, n: int = 400, seed: int = 0, noise: float = 0.0) -> pd.DataFrame:
    """Examples of equal difficulty for every plan: those below a plan's share are answered right."""
    draw = np.random.default_rng(seed)
    luck = np.arange(n) / n + noise * draw.standard_normal(n)
    names = [f"e{i}" for i in range(n)]
    return pd.DataFrame({"task": "vqa", "example": names, "cluster": names, "score": (luck < right).astype(float)})
