"""Choosing among measured plans by right answers, by their likelihood, or by scores that are read with likelihoods.

    python -m experiments.benchmarks.likelihoods [--models scenes-llava,...] [--tasks vqa,caption] [--test 1000]

All plans of reports/quick-plans.csv for a model and a task run on the same examples. Some of the examples are drawn; of
each group of plans of about the same size the best one by those is chosen, and judged on the other examples. What it
loses there to the group's best plan is its regret, which holds the luck of the other examples, too.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.benchmarks.quick_plans import ASKED, TABLE, TESTED, kept
from sensitivity import inspect, load
from sensitivity.analysis.likelihood import link
from sensitivity.api.sweeping import sweep, with_calibration
from sensitivity.spec.files import overwrite
from sensitivity.spec.sizes import size

PAGE = TABLE.with_name("likelihoods.md")
SIZES = (2.5, 2.72, 2.9, 3.1, 3.4, 3.7, 4.5)  # bits per weight between which plans are compared
DRAWS = 200
WAYS = ("right answers", "likelihood", "both")


def answers(name: str, task: str, test: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores and negative log-likelihoods (plans x examples), and the plans' sizes."""
    vlm = load(f"embedded:{name}")
    parts = inspect(vlm, by="group.kind")
    table = pd.read_csv(TABLE)
    table = table[(table["model"] == name) & (table["task"] == task)].drop_duplicates("plan")
    schemes, statistics = with_calibration(vlm, parts, ASKED.schemes, [task])
    plans, _ = kept(table.assign(chooser="sweep"), schemes)
    with tempfile.TemporaryDirectory() as place:
        study = sweep(vlm, parts, plans, [task], Path(place) / "test", n=test, seed=TESTED, statistics=statistics)
        frames = [study.examples(plan) for plan in plans]
    ordered = [frame.sort_values("example") for frame in frames if frame is not None]
    scores, nll = (np.array([frame[column] for frame in ordered]) for column in ("score", "nll"))
    return scores, nll, np.array([size(parts, plan).bpw for plan in plans])


def regrets(scores: np.ndarray, nll: np.ndarray, bpw: np.ndarray, n: int) -> np.ndarray:
    """The mean regret of each of WAYS, on n examples."""
    draw, found = np.random.default_rng(0), []
    groups = [np.flatnonzero((bpw >= low) & (bpw < high)) for low, high in itertools.pairwise(SIZES)]
    for _ in range(DRAWS):
        order = draw.permutation(scores.shape[1])
        seen, judged = order[:n], order[n:]
        mean, loss, truth = scores[:, seen].mean(1), nll[:, seen].mean(1), scores[:, judged].mean(1)
        noise = (scores[:, seen] - scores[:, seen].mean(0)).std(1) / n**0.5
        relation = link(mean, loss, noise, float(mean.max()))
        both = mean if relation is None else relation.steadied(mean, loss, noise)
        found.append([
            np.mean([truth[group].max() - truth[group[np.argmax(read[group])]] for group in groups if len(group) > 1])
            for read in (mean, -loss, both)
        ])  # fmt: skip
    return np.array(np.mean(found, axis=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="scenes-llava-heavy,scenes-llava,scenes-blip2")
    parser.add_argument("--tasks", default="vqa,caption")
    parser.add_argument("--test", type=int, default=1000)
    args = parser.parse_args()
    lines = [f"| model | task | plans | examples | {' | '.join(WAYS)} |", "|---|---|---|---|---|---|---|"]
    for name in args.models.split(","):
        for task in args.tasks.split(","):
            scores, nll, bpw = answers(name, task, args.test)
            for n in (100, 300):
                cells = " | ".join(f"{value:.4f}" for value in regrets(scores, nll, bpw, n))
                lines.append(f"| {name} | {task} | {len(scores)} | {n} | {cells} |")
                print(lines[-1], flush=True)
    overwrite(
        PAGE,
        "# Right answers, and their likelihood\n\n"
        "`python -m experiments.benchmarks.likelihoods`; its first lines say how. Mean regret of the plan that is\n"
        "chosen among plans of about the same size: by its right answers, by their mean log-likelihood, or by its\n"
        "score as analyses read it (`sensitivity/analysis/likelihood.py`).\n\n" + "\n".join(lines) + "\n",
    )


if __name__ == "__main__":
    main()
