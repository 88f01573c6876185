"""`sweep --search frontier --scores swing` beside a sweep without scores: how many plans each needs.

    python -m experiments.benchmarks.scored_sweeps [--models scenes-llava-heavy] [--task vqa] [--seeds 0,1]

Each sweep runs some plans on n examples, and `recommend` chooses for seven budgets (those of quick_plans.py). What it
chooses runs on examples that no chooser saw, and is compared there, example by example, with what a sweep of 60 plans
chose (reports/quick-plans.csv). `shuffled` expects the damages of `swing`, each of another component. Rows of
reports/scored-sweeps.csv are not run again.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.benchmarks.quick_plans import ASKED, ROOT, TESTED, budgets, error_of_mean, kept
from experiments.benchmarks.quick_plans import TABLE as SWEPT
from sensitivity import inspect, load, sweep
from sensitivity.analysis.recommending.request import PlanRequest
from sensitivity.analysis.search.plan_lists import plans as plans_of
from sensitivity.api.recommending import recommend_each
from sensitivity.api.scoring import scored
from sensitivity.api.sweeping import begin_sweep
from sensitivity.measure.attribution.calibrated import Scores
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan
from sensitivity.study.scores import paired_difference
from sensitivity.study.storage import expected
from sensitivity.study.study import Study

TABLE = ROOT / "reports" / "scored-sweeps.csv"
NONE, SCORE, SHUFFLED = "none", "swing", "shuffled"


def shuffled(scores: Scores, seed: int) -> Scores:
    """The scores, each of another component."""
    names = np.random.default_rng(seed).permutation(list(scores)).tolist()
    return {mine: scores[other] for mine, other in zip(names, [*names[1:], names[0]], strict=True)}


def compared(
    name: str, task: str, seed: int, n: int, test: int, trials: list[int], swept: pd.DataFrame, missing: list[str]
) -> Iterator[dict[str, object]]:
    """For each missing expectation: the plans that a sweep chooses after so many trials, beside those of 60."""
    vlm = load(f"embedded:{name}")
    parts = inspect(vlm, by="group.kind")
    with tempfile.TemporaryDirectory() as place:
        os.environ["SENSITIVITY_CACHE"] = f"{place}/cache"
        found = scored(vlm, parts, ASKED.schemes, [task], [SCORE], ASKED.examples)
        swing, data = found.scores[0].scores, {"statistics": found.given.statistics}
        expectations: Mapping[str, Scores | None] = {NONE: None, SCORE: swing, SHUFFLED: shuffled(swing, seed)}
        base = kept(swept, found.schemes, parts)[0]
        chosen: dict[tuple[str, int], list[Plan]] = {}
        seconds = {}
        for what in missing:
            damages = expectations[what]
            began = time.process_time()
            for most in sorted(trials):  # a sweep goes on where the one of fewer trials ended

                def plans(study: Study, damages: Scores | None = damages, most: int = most) -> Iterator[Plan]:
                    if damages is not None:
                        expected.save(study.path, damages, SCORE)
                    listed = plans_of(parts, found.schemes, "frontier", most, seed)
                    assert callable(listed)
                    return iter(listed(study))

                study, steps = begin_sweep(vlm, parts, plans, [task], Path(place) / what, n=n, seed=seed, **data)
                for _ in steps:
                    pass
                request = PlanRequest(budgets(parts, ASKED.above), {study.tasks[0]: 1.0})
                chosen[what, most] = [one.plan for one in recommend_each(study, request, vlm)]
                seconds[what, most] = time.process_time() - began
        every = list(dict.fromkeys(plan for some in (base, *chosen.values()) for plan in some))
        tested = sweep(vlm, parts, every, [task], Path(place) / "test", n=test, seed=TESTED, **data)
        for (what, most), mine in chosen.items():
            for bpw, plan, other in zip(request.bpw, mine, base, strict=True):
                own = tested.examples(plan)
                assert own is not None
                both = own.merge(tested.examples(other), on="example", suffixes=("", "_base"))
                gain = paired_difference(both["score"], both["score_base"], both["cluster"])
                yield {
                    "model": name, "task": task, "seed": seed, "n": n, "trials": most, "expected": what, "bpw": bpw,
                    "score": round(float(both["score"].mean()), 4), "to_60": round(gain.mean, 4),
                    "se": round(gain.se, 4), "cpu_s": round(seconds[what, most], 1), "plan": plan.describe(),
                }  # fmt: skip


def summary(table: pd.DataFrame) -> str:
    lines = [
        "| model | task | plans | expected | mean difference to 60 plans | worst budget |",
        "|---|---|---|---|---|---|",
    ]
    for (model, task, trials), rows in table.groupby(["model", "task", "trials"]):
        for what, own in rows.groupby("expected", sort=False):
            worst, spread = own.loc[own["to_60"].idxmin()], error_of_mean(own)
            lines.append(
                f"| {model} | {task} | {trials} | {what} | {own['to_60'].mean():+.4f} ± {spread:.4f} | "
                f"{worst['to_60']:+.4f} ± {worst['se']:.4f} ({worst['bpw']:g} bpw, seed {worst['seed']}) |"
            )
    return "\n".join(lines)


def page(table: pd.DataFrame) -> str:
    return (
        "# Sweeps that start from a score\n\n"
        "`python -m experiments.benchmarks.scored_sweeps` (models, tasks, seeds and plans as in the table): by\n"
        "group.kind, gptq at 2, 3, 4, 6, 8 bits, `--search frontier` and `recommend` at seven budgets, on 300\n"
        "examples. Differences to what a sweep of 60 plans without scores chose are of scores on 1,000 examples that\n"
        "no chooser saw; ± is a standard error over examples, which all budgets share. `swing`: as with `--scores\n"
        "swing`; `shuffled`: the same damages, each of another component. A sweep of more plans goes on with that of\n"
        "fewer.\n\n"
        f"{summary(table)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="scenes-llava-heavy")
    parser.add_argument("--task", default="vqa")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--trials", default="8,15,30")
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--test", type=int, default=1000)
    args = parser.parse_args()
    known = pd.read_csv(SWEPT)
    table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=["model", "task", "seed", "expected"])
    for name in args.models.split(","):
        for seed in map(int, args.seeds.split(",")):
            swept = known[(known[["model", "task", "seed", "n"]] == [name, args.task, seed, args.n]).all(axis=1)]
            same = (table[["model", "task", "seed"]] == [name, args.task, seed]).all(axis=1)
            missing = [what for what in (NONE, SCORE, SHUFFLED) if what not in set(table[same]["expected"])]
            if not missing:
                continue
            trials = [int(most) for most in args.trials.split(",")]
            more = pd.DataFrame(compared(name, args.task, seed, args.n, args.test, trials, swept, missing))
            # read again, since another process may have added rows of its own
            table = pd.concat([pd.read_csv(TABLE) if TABLE.exists() else table, more], ignore_index=True)
            overwrite(TABLE, table.to_csv(index=False))
            print(more.drop(columns="plan").to_string(), flush=True)
    overwrite(TABLE.with_suffix(".md"), page(table))


if __name__ == "__main__":
    main()
