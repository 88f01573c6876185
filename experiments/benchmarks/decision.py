"""How long the table wing takes: ranking, recommending, the report.

    python experiments/benchmarks/decision.py

Ranking 448 trials with 100 bootstraps and SHAP (aim: under 20 s on two cores), recommending over 12 components and 6
widths (under 1 s), the report of 1,500 trials (under 15 s and 6 MB). The tables are planted: they have the shape of
published ones and need nobody's data.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from sensitivity import estimators
from sensitivity.allocate import solve
from sensitivity.components import ComponentMap, Kept, Weight
from sensitivity.importance import bootstrap, rank
from sensitivity.plan import Plan, Scheme
from sensitivity.readings import of_study
from sensitivity.report import report
from sensitivity.robustness import without_levels
from sensitivity.trials import Study

ROOT = Path(__file__).parent.parent.parent


def study(folder: Path, names: list[str], bits: np.ndarray) -> Study:
    """Damages that multiply, and noise."""
    draw = np.random.default_rng(0)
    parts = ComponentMap(
        "planted", "linear",
        tuple(Weight(f"{name}.weight", 1, 10**7, name.split(".")[0], None, 0, None) for name in names),
        (Kept("rest", 10**7, "rest"),),
    )  # fmt: skip
    harm = np.exp(-(bits - draw.uniform(0, 2.5, len(names))))
    score = np.exp(-harm.sum(axis=1)) + 0.02 * draw.standard_normal(len(bits))
    made = Study.create(folder, parts, ["score"], {"model": "planted"})
    plans = [
        Plan(tuple((n, None if b == 16 else Scheme("codes", int(b))) for n, b in zip(names, row, strict=True)))
        for row in bits
    ]
    made.append(plans, [{"score": float(value)} for value in score])
    return made


def timed(what: str, lines: list[str], start: float, aim: str) -> None:
    lines.append(f"| {what} | {time.perf_counter() - start:.1f} s | {aim} |")
    print(lines[-1], flush=True)


def main() -> None:
    lines = ["| what | time | aim |", "|---|---|---|"]
    draw = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        three = ["vision", "connector", "language"]
        grid = np.array(
            [*itertools.product((2, 3, 4, 5, 6, 7, 8, 16), (2, 3, 4, 5, 6, 7, 8, 16), (3, 4, 5, 6, 7, 8, 16))]
        )
        small = study(Path(folder) / "448", three, grid.astype(float))
        rank(small, bootstraps=1)  # imports
        start = time.perf_counter()
        rank(small)
        timed("rank 448 trials, 100 bootstraps", lines, start, "20 s")
        readings = of_study(small)
        groups = [[0], [1], [2]]
        start = time.perf_counter()
        bootstrap(readings, groups, 100, 0)
        timed("of which bootstraps", lines, start, "")
        fitted = estimators.fit(readings.bits, readings.score)
        for name in ("shap", "fanova"):
            start = time.perf_counter()
            estimators.ESTIMATORS[name](estimators.fit(readings.bits, readings.score))
            timed(f"of which {name}, once", lines, start, "")
        start = time.perf_counter()
        without_levels(readings, three, fitted.groups, 0)
        timed("of which leaving out one level after the other", lines, start, "")

        names = [f"{part}.{i:02d}" for part in ("vision", "connector", "language") for i in range(4)]
        many = study(Path(folder) / "12", names, draw.choice([2, 3, 4, 5, 6, 8], size=(300, 12)).astype(float))
        start = time.perf_counter()
        solve(many, bpw=4.0)
        timed("recommend over 12 components and 6 widths, 300 trials", lines, start, "1 s")

        nine = [f"{part}.{i}" for part in ("vision", "connector", "language") for i in range(3)]
        large = study(Path(folder) / "1500", nine, draw.choice([3, 4, 5, 6, 8, 16], size=(1500, 9)).astype(float))
        start = time.perf_counter()
        page = report(large, Path(folder) / "report")
        timed("report of 1,500 trials", lines, start, "15 s")
        lines.append(f"| its size | {page.stat().st_size / 1e6:.1f} MB | 6 MB |")
    load = os.getloadavg()[0]
    text = "\n".join(lines)
    (ROOT / "reports" / "decision.md").write_text(
        f"# Speed of the table wing\n\n`python experiments/benchmarks/decision.py` on {os.cpu_count()} cores; "
        f"load average at the end {load:.1f} (above {os.cpu_count()}: other work was running).\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
