"""`sensitivity plan` for one budget beside a sweep of 60 plans and `recommend`, at each of seven budgets.

    python -m experiments.benchmarks.one_budget [--models scenes-llava-heavy] [--task vqa] [--seeds 0,1,2] [--again]

Unlike in quick_plans.py, each budget is a call of its own, as users make it: with a calibration and a cache of its own,
and with the default of 1,000 examples. The sweep is the same for all budgets of a seed; its seconds are those of its
60 plans and of one budget's verification. What both choose runs on examples that no chooser saw, and is compared there
example by example. Seconds are of the processor. Rows of reports/one-budget.csv are not run again; with --again only
the sweeps are not, and `plan` is: such rows have no seconds, since a machine's speed differs from day to day. The
report counts the rows in which `plan` opened with today's scores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.benchmarks.quick_plans import (
    ASKED,
    BITS,
    OPENING,
    ROOT,
    TESTED,
    TRIALS,
    budgets,
    by_plan,
    described,
    error_of_mean,
)
from sensitivity import inspect, load, sweep
from sensitivity.analysis.recommending.request import PlanRequest
from sensitivity.analysis.search.plan_lists import plans as plans_of
from sensitivity.api.recommending import recommend_each
from sensitivity.api.sweeping import begin_sweep, with_calibration
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan
from sensitivity.study.scores import paired_difference

TABLE = ROOT / "reports" / "one-budget.csv"
CLEARLY = 2.0  # standard errors
KEYS = ["model", "task", "seed", "n"]
TODAY = " ".join(OPENING)


def of_sweep(
    vlm: VLM, parts: ComponentMap, task: str, n: int, seed: int, folder: Path
) -> dict[float, tuple[Plan, float]]:
    """For each budget, the plan that a sweep and `recommend` choose, and the seconds of both."""
    os.environ["SENSITIVITY_CACHE"] = f"{folder}-cache"  # an empty one
    began = time.process_time()
    schemes, statistics = with_calibration(vlm, parts, ASKED.schemes, [task], ASKED.examples)
    listed = plans_of(parts, schemes, "frontier", TRIALS, seed)
    study, steps = begin_sweep(vlm, parts, listed, [task], folder, n=n, seed=seed, statistics=statistics)
    for _ in steps:
        pass
    searched, found = time.process_time() - began, {}
    for bpw in budgets(parts, ASKED.above):  # plans that an earlier budget verified are free: that favors the sweep
        began = time.process_time()
        chosen = recommend_each(study, PlanRequest((bpw,), {study.tasks[0]: 1.0}), vlm)[0]
        found[bpw] = chosen.plan, searched + time.process_time() - began
    return found


def compared(name: str, task: str, seed: int, n: int, test: int, before: pd.DataFrame) -> Iterator[dict[str, object]]:
    """One row for each budget: the score of `plan`'s choice on fresh examples, beside that of the sweep's."""
    vlm = load(f"embedded:{name}")
    parts = inspect(vlm, by="group.kind")
    with tempfile.TemporaryDirectory() as place:
        if len(before):
            schemes, _ = with_calibration(vlm, parts, ASKED.schemes, [task], ASKED.examples)
            chosen = zip(described(before["sweep_plan"], schemes, parts), before["sweep_cpu_s"], strict=True)
            swept = dict(zip(before["bpw"], chosen, strict=True))
        else:
            swept = of_sweep(vlm, parts, task, n, seed, Path(place) / "sweep")
        planned = {}
        for more, bpw in zip(ASKED.above, swept, strict=True):
            asked = replace(ASKED, above=(more,))
            plans, seconds, ran = by_plan(vlm, parts, task, n, seed, Path(place) / f"plan-{bpw:g}", asked)
            planned[bpw] = plans["plan"][0], seconds["plan"], ran
        every = list(dict.fromkeys(one[0] for found in (swept, planned) for one in found.values()))
        tested = sweep(vlm, parts, every, [task], Path(place) / "test", n=test, seed=TESTED)
        for bpw, (plan, seconds_of_plan, ran) in planned.items():
            theirs, seconds_of_sweep = swept[bpw]
            own = tested.examples(plan)
            assert own is not None
            both = own.merge(tested.examples(theirs), on="example", suffixes=("", "_sweep"))
            gain = paired_difference(both["score"], both["score_sweep"], both["cluster"])
            yield {
                "model": name, "task": task, "seed": seed, "n": n, "bpw": bpw,
                "score": round(float(both["score"].mean()), 4), "to_sweep": round(gain.mean, 4),
                "se": round(gain.se, 4), "cpu_s": None if len(before) else round(seconds_of_plan, 1),
                "sweep_cpu_s": None if len(before) else round(seconds_of_sweep, 1),
                "plans_run": ran, "tested_on": len(both), "opening": TODAY, "plan": plan.describe(),
                "sweep_plan": theirs.describe(),
            }  # fmt: skip


def summary(table: pd.DataFrame) -> str:
    """A row for each model and task, and one for all."""
    lines = [
        "| model | task | budgets | mean difference to the sweep's | worst | clearly worse | clearly better | "
        "of the sweep's CPU seconds (timed side by side) | at most |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups = [(*names, rows) for names, rows in table.groupby(["model", "task"])]
    for model, task, rows in [*groups, ("all", "", table)]:
        worst, errors = rows.loc[rows["to_sweep"].idxmin()], [error_of_mean(own) for _, own in rows.groupby(KEYS[:2])]
        spread = np.linalg.norm(errors) / len(errors)  # models and tasks err each by itself
        timed = rows.dropna(subset=["cpu_s"])
        seconds = "– | –"
        if len(timed):
            each = timed["cpu_s"] / timed["sweep_cpu_s"]
            seconds = f"{timed['cpu_s'].sum() / timed['sweep_cpu_s'].sum():.0%} | {each.max():.0%}"
        lines.append(
            f"| {model} | {task} | {len(rows)} | {rows['to_sweep'].mean():+.4f} ± {spread:.4f} | "
            f"{worst['to_sweep']:+.4f} ± {worst['se']:.4f} ({worst['bpw']:g} bpw, seed {worst['seed']}) | "
            f"{(rows['to_sweep'] < -CLEARLY * rows['se']).sum()} | {(rows['to_sweep'] > CLEARLY * rows['se']).sum()} | "
            f"{seconds} |"
        )
    return "\n".join(lines)


def page(table: pd.DataFrame) -> str:
    """The report."""
    return (
        "# A plan for one budget, beside a sweep\n\n"
        "`python -m experiments.benchmarks.one_budget` (models, tasks and seeds as in the table): by group.kind,\n"
        f"gptq at {', '.join(map(str, BITS))} bits, a sweep of {TRIALS} plans by `--search frontier` and `recommend`, "
        "beside a call of\n`plan` for each budget. Differences are of scores on examples that no chooser saw, on the "
        "same\nexamples; ± is a standard error over examples, which all budgets and seeds of a model and task share, "
        "so\nthat their mean is hardly surer than each. Negative: worse than the sweep's plan. Clearly: by two "
        "standard\n"
        "errors, of which chance alone gives one budget in forty each way.\n\n"
        f"{summary(table)}\n"
    )


def main() -> None:
    """Run what is missing, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="scenes-llava-heavy")
    parser.add_argument("--task", default="vqa")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--again", action="store_true", help="run plan again, not the sweeps")
    args = parser.parse_args()
    table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=KEYS)
    for seed in map(int, args.seeds.split(",")):
        for name in args.models.split(","):
            own = [name, args.task, seed, args.n]
            before = table[(table[KEYS] == own).all(axis=1)]
            if len(before) and not args.again:
                continue
            more = pd.DataFrame(compared(name, args.task, seed, args.n, args.test, before))
            # read again, since another process may have added rows of its own
            table = pd.read_csv(TABLE) if TABLE.exists() else table
            others = table[~(table[KEYS] == own).all(axis=1)]
            table = pd.concat([others, more], ignore_index=True) if len(others) else more
            overwrite(TABLE, table.to_csv(index=False))
            print(more.drop(columns=["plan", "sweep_plan"]).to_string(), flush=True)
    overwrite(TABLE.with_suffix(".md"), page(table[table["opening"] == TODAY]))


if __name__ == "__main__":
    main()
