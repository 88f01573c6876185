"""How long it takes to rank, to recommend and to write the report, without any model.

    python -m experiments.benchmarks.decision

Ranking 448 trials with 100 bootstraps and SHAP (target: under 20 s on two cores), recommending over 12 components and
6 bit widths (under 1 s), the report of 1,500 trials (under 15 s and 6 MB). The tables are synthetic and as large as
published ones.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from sensitivity.analysis.allocate.budget import solve
from sensitivity.analysis.importance import estimators
from sensitivity.analysis.importance.ranking import bootstrap, rank
from sensitivity.analysis.importance.robustness import without_levels
from sensitivity.analysis.observations import observations_of
from sensitivity.analysis.reporting.page import report
from sensitivity.spec.components import ComponentMap, Kept, Weight
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.study import Study

ROOT = Path(__file__).parent.parent.parent


def study(folder: Path, names: list[str], bits: np.ndarray) -> Study:
    """A study whose scores are a known function of the bits, plus noise."""
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


@contextmanager
def timed(what: str, lines: list[str], aim: str = "") -> Iterator[None]:
    """CPU seconds are what the work takes; wall seconds are longer on a machine that does other work, too."""
    wall, work = time.perf_counter(), time.process_time()
    yield
    lines.append(f"| {what} | {time.process_time() - work:.1f} s | {time.perf_counter() - wall:.1f} s | {aim} |")
    print(lines[-1], flush=True)


def main() -> None:
    lines = ["| what | CPU | wall | target |", "|---|---|---|---|"]
    draw = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        three = ["vision", "connector", "language"]
        widths = ((2, 3, 4, 5, 6, 7, 8, 16), (2, 3, 4, 5, 6, 7, 8, 16), (3, 4, 5, 6, 7, 8, 16))
        small = study(Path(folder) / "448", three, np.array([*itertools.product(*widths)], dtype=float))
        rank(small, bootstraps=1)  # imports
        with timed("rank 448 trials, 100 bootstraps", lines, "20 s"):
            rank(small)
        with timed("the same again, as kept in the study's folder", lines):
            rank(small)
        observations, groups = observations_of(small), [[0], [1], [2]]
        with timed("of which bootstraps", lines):
            bootstrap(observations, groups, 100, 0)
        for name in ("shap", "fanova"):
            with timed(f"of which {name}, once", lines):
                estimators.ESTIMATORS[name](estimators.fit(observations.bits, observations.score))
        with timed("of which leaving out one level after the other", lines):
            without_levels(observations, three, groups, 0)

        names = [f"{part}.{i:02d}" for part in ("vision", "connector", "language") for i in range(4)]
        many = study(Path(folder) / "12", names, draw.choice([2, 3, 4, 5, 6, 8], size=(300, 12)).astype(float))
        with timed("recommend over 12 components and 6 widths, 300 trials", lines, "1 s"):
            solve(many, bpw=4.0)
        with timed("the same for six budgets at once", lines):
            solve(many, bpw=[3.5, 4, 4.5, 5, 6, 8])

        nine = [f"{part}.{i}" for part in ("vision", "connector", "language") for i in range(3)]
        large = study(Path(folder) / "1500", nine, draw.choice([3, 4, 5, 6, 8, 16], size=(1500, 9)).astype(float))
        with timed("report of 1,500 trials, nothing ranked before", lines, "15 s"):
            page = report(large, Path(folder) / "report")
        with timed("the same again", lines):
            report(large, Path(folder) / "report")
        lines.append(f"| its size | {page.stat().st_size / 1e6:.1f} MB | | 6 MB |")
    text, load = "\n".join(lines), os.getloadavg()[0]
    overwrite(
        ROOT / "reports" / "decision.md",
        "# Time to rank, recommend and report\n\n"
        f"`python -m experiments.benchmarks.decision` on {os.cpu_count()} cores; "
        f"load average at the end {load:.1f} (above {os.cpu_count()}: other work was running).\n\n{text}\n",
    )


if __name__ == "__main__":
    main()
