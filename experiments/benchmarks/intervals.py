"""How often the 95 % interval of an importance contains the true value, on synthetic tables.

    python -m experiments.benchmarks.intervals [--tables 40] [--bootstraps 60]

The true value is the consensus of the same estimators on the whole table without noise. Writes reports/intervals.md.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from sensitivity.analysis.importance.ranking import rank
from sensitivity.analysis.observations import Observations
from sensitivity.spec.files import overwrite

ROOT = Path(__file__).parent.parent.parent
NAMES = ("vision", "connector", "language")
BITS = np.array([*itertools.product((2, 3, 4, 6, 8, 16), repeat=3)], dtype=float)


def harm(column: int, half: float) -> np.ndarray:
    return np.exp(-(BITS[:, column] - half))


TRUTHS = {
    "additive, connector irrelevant": 1 - 0.3 * harm(0, 2) - 0.1 * harm(2, 2),
    "vision and language tied": 1 - 0.3 * harm(0, 2) - 0.05 * harm(1, 2) - 0.3 * harm(2, 2),
    "interacting": np.exp(-harm(0, 3) - harm(1, 0.5) - harm(2, 2.5)),
}


def observations(score: np.ndarray, rows: np.ndarray) -> Observations:
    unknown = np.full(len(rows), np.nan)
    keys = tuple(str(row) for row in rows)
    return Observations("planted", NAMES, BITS[rows], score, unknown, keys, unknown, ("codes",) * len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=40)
    parser.add_argument("--bootstraps", type=int, default=60)
    args = parser.parse_args()
    rows, everything = [], np.arange(len(BITS))
    for name, truth in TRUTHS.items():
        right = rank(observations(truth, everything), bootstraps=0, thorough=False).table
        for trials, noise in ((216, 0.02), (100, 0.02), (216, 0.06)):
            for seed in range(args.tables):
                draw = np.random.default_rng(seed)
                some = draw.choice(everything, trials, replace=False)
                noisy = truth[some] + noise * draw.standard_normal(trials)
                found = rank(observations(noisy, some), bootstraps=args.bootstraps, seed=seed, thorough=False).table
                for part in found.index:
                    share = right["consensus"][part]
                    low, high = found.loc[part, ["consensus.low", "consensus.high"]]
                    rows.append({
                        "truth": name, "trials": trials, "noise": noise, "part": part, "share": share,
                        "held": float(low - 1e-9 <= share <= high + 1e-9), "width": high - low,
                    })  # fmt: skip
            save(pd.DataFrame(rows), args)


def save(rows: pd.DataFrame, args: argparse.Namespace) -> None:
    table = rows.groupby(["truth", "trials", "noise", "part"], sort=False)[["share", "held", "width"]].mean().round(2)
    text = (
        "# Do the intervals hold the truth?\n\n"
        f"`python -m experiments.benchmarks.intervals --tables {args.tables} --bootstraps {args.bootstraps}`: true "
        "share (%), how often the 95 % interval held it, and its mean width in points.\n\n"
        f"```\n{table.to_string()}\n```\n\nOverall: {rows['held'].mean():.3f}\n"
    )
    overwrite(ROOT / "reports" / "intervals.md", text)
    print(text, flush=True)


if __name__ == "__main__":
    main()
