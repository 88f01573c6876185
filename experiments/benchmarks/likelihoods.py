"""Choosing among measured plans by right answers, by their likelihood, or by scores that are read with likelihoods.

    python -m experiments.benchmarks.likelihoods [--models scenes-llava,...] [--tasks vqa,caption] [--test 1000]

For each budget the best plans by `gram` are drawn, with a random factor on each component's damage, so that neither
way had a part in finding them. All run on the same examples. Some of the examples are drawn; of each budget's plans the
best one by those is chosen, and judged on the other examples. What it loses there to the best plan of its budget is its
regret, which holds the luck of the other examples, too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from experiments.benchmarks.quick_plans import ASKED, SEVEN, TABLE, TESTED, budgets
from sensitivity import inspect, load
from sensitivity.analysis.allocate.by_scores import optimum
from sensitivity.analysis.likelihood import link
from sensitivity.api.scoring import scored
from sensitivity.api.sweeping import sweep
from sensitivity.spec.files import overwrite

PAGE = TABLE.with_name("likelihoods.md")
PER_BUDGET, SPREAD = 6, 0.7  # plans that are drawn for a budget, and the deviation of the factors' logarithms
DRAWS = 200
WAYS = ("right answers", "likelihood", "both")


def answers(name: str, task: str, test: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores and negative log-likelihoods (plans x examples), and the plans' budgets."""
    vlm = load(f"embedded:{name}")
    parts = inspect(vlm, by="group.kind")
    found = scored(vlm, parts, ASKED.schemes, [task], ["gram"])
    (gram,) = found.scores
    draw, drawn = np.random.default_rng(0), {}
    for budget in budgets(parts, SEVEN):
        for _ in range(PER_BUDGET):
            factors = dict(zip(parts.names, np.exp(SPREAD * draw.normal(size=len(parts.names))), strict=True))
            changed = {part: {one: factors[part] * v for one, v in row.items()} for part, row in gram.scores.items()}
            drawn.setdefault(optimum(parts, changed, budget), budget)
    with tempfile.TemporaryDirectory() as place:
        study = sweep(
            vlm, parts, list(drawn), [task], Path(place) / "test", n=test, seed=TESTED,
            statistics=found.given.statistics,
        )  # fmt: skip
        frames = [study.examples(plan) for plan in drawn]
    ordered = [frame.sort_values("example") for frame in frames if frame is not None]
    scores, nll = (np.array([frame[column] for frame in ordered]) for column in ("score", "nll"))
    return scores, nll, np.array(list(drawn.values()))


def regrets(scores: np.ndarray, nll: np.ndarray, within: np.ndarray, n: int) -> np.ndarray:
    """The mean regret of each of WAYS, on n examples; `within` has each plan's budget."""
    draw, found = np.random.default_rng(0), []
    groups = [np.flatnonzero(within == budget) for budget in np.unique(within)]
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
            scores, nll, within = answers(name, task, args.test)
            for n in (100, 300):
                cells = " | ".join(f"{value:.4f}" for value in regrets(scores, nll, within, n))
                lines.append(f"| {name} | {task} | {len(scores)} | {n} | {cells} |")
                print(lines[-1], flush=True)
    overwrite(
        PAGE,
        "# Right answers, and their likelihood\n\n"
        "`python -m experiments.benchmarks.likelihoods`; its first lines say how. Mean regret of the plan that is\n"
        "chosen among random plans for a budget: by its right answers, by their mean log-likelihood, or by its\n"
        "score as analyses read it (`sensitivity/analysis/likelihood.py`).\n\n" + "\n".join(lines) + "\n",
    )


if __name__ == "__main__":
    main()
