"""`sensitivity plan` beside a sweep of 60 plans and `recommend`: the plans that each chooses, and what that costs.

    python -m experiments.benchmarks.quick_plans [--models scenes-llava-heavy] [--seeds 0,1] [--n 500] [--again]

Both choose plans for the same budgets, on n examples of the chooser's seed, each with a calibration and a cache of its
own. What they choose then runs on examples that no chooser saw, and the scores are compared example by example. Seconds
are of the processor, calibration and verification included. Rows of reports/quick-plans.csv are not run again; with
--again only the sweeps are not, and `plan` is.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sensitivity import inspect, load, scheme
from sensitivity.analysis.allocate.by_scores import optimum
from sensitivity.analysis.recommending.request import PlanRequest
from sensitivity.analysis.search.plan_lists import plans as plans_of
from sensitivity.api.planning import MAX_EVALUATIONS, OPENING, begin_plan, plans_to_verify, search_examples
from sensitivity.api.recommending import begin_recommendation, recommend_each
from sensitivity.api.scoring import scored
from sensitivity.api.sweeping import begin_sweep, sweep, with_calibration
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import size
from sensitivity.study.scores import paired_difference

ROOT = Path(__file__).parent.parent.parent
TABLE = ROOT / "reports" / "quick-plans.csv"
BITS, TRIALS = (2, 3, 4, 6, 8), 60
ABOVE = (0.25, 0.6, 1.2)  # budgets, in bits per weight above the smallest plan
SEVEN = (0.15, 0.25, 0.4, 0.6, 0.9, 1.2, 1.8)
TESTED = 90_000_000  # seed of the examples that no chooser saw


def budgets(parts: ComponentMap, above: Sequence[float] = ABOVE) -> tuple[float, ...]:
    least = size(parts, Plan.uniform(parts, scheme("gptq", min(BITS)))).bpw
    return tuple(round(least + more, 2) for more in above)


@dataclass(frozen=True)
class Asked:
    """The schemes that plans are chosen from, the data that they are calibrated on (by default the task's), budgets."""

    schemes: tuple[Scheme, ...] = tuple(scheme("gptq", bits) for bits in BITS)
    calibration: str = ""
    examples: int = 128
    above: tuple[float, ...] = ABOVE


ASKED = Asked(above=SEVEN)


def by_sweep(
    vlm: VLM, parts: ComponentMap, task: str, n: int, seed: int, folder: Path, asked: Asked = Asked()
) -> tuple[list[Plan], float]:
    os.environ["SENSITIVITY_CACHE"] = f"{folder}-cache"  # an empty one
    began = time.process_time()
    schemes, statistics = with_calibration(vlm, parts, asked.schemes, [asked.calibration or task], asked.examples)
    listed = plans_of(parts, schemes, "frontier", TRIALS, seed)
    study, steps = begin_sweep(vlm, parts, listed, [task], folder, n=n, seed=seed, statistics=statistics)
    for _ in steps:
        pass
    chosen = recommend_each(study, PlanRequest(budgets(parts, asked.above), {study.tasks[0]: 1.0}), vlm)
    return [one.plan for one in chosen], time.process_time() - began


def by_plan(
    vlm: VLM,
    parts: ComponentMap,
    task: str,
    n: int,
    seed: int,
    folder: Path,
    asked: Asked = Asked(),
    trials: int = MAX_EVALUATIONS,
) -> tuple[dict[str, list[Plan]], dict[str, float], int]:
    """What `sensitivity plan` chooses; the optima of its scores alone; seconds of each; and how many plans it ran."""
    os.environ["SENSITIVITY_CACHE"] = f"{folder}-cache"  # an empty one
    began = time.process_time()
    found = scored(vlm, parts, asked.schemes, [asked.calibration or task], OPENING, asked.examples)
    bpw = budgets(parts, asked.above)
    request = PlanRequest(bpw, {task: 1.0}, top=plans_to_verify(bpw))
    scoring = time.process_time() - began
    statistics = found.given.statistics
    few = search_examples(n, [])
    planning = begin_plan(
        vlm, parts, [task], folder, request, found.scores, trials, n=few, seed=seed, statistics=statistics
    )
    for _ in planning.steps:
        pass
    chosen, steps = begin_recommendation(
        planning.study, planning.request, vlm, planning.proposals(), n=n, statistics=statistics
    )
    for _ in steps:
        pass
    plans = {"plan": [one.plan for one in chosen()]}
    seconds = {"plan": time.process_time() - began}
    for one in found.scores:
        plans[one.name] = [optimum(parts, one.scores, bpw) for bpw in request.bpw]
        seconds[one.name] = scoring
    return plans, seconds, len(planning.study.trials())


def described(texts: Iterable[str], schemes: Sequence[Scheme], parts: ComponentMap) -> list[Plan]:
    """Plans, read from their descriptions in a table."""
    widths = {one.widths: one for one in schemes} | {"native": None}
    uniform = {plan.describe(): plan for plan in (Plan.uniform(parts, one) for one in [None, *schemes])}

    def read(text: str) -> Plan:
        if text in uniform:
            return uniform[text]
        choices = [choice.rsplit(" ", 1) for choice in text.split(" · ")]
        return Plan(tuple((name, widths[width]) for name, width in choices))

    return [read(text) for text in texts]


def kept(rows: pd.DataFrame, schemes: Sequence[Scheme], parts: ComponentMap) -> tuple[list[Plan], float]:
    """The plans that a sweep chose before, and its seconds."""
    own = rows[rows["chooser"] == "sweep"].sort_values("bpw")
    return described(own["plan"], schemes, parts), float(own["cpu_s"].iloc[0])


def compared(name: str, task: str, seed: int, n: int, test: int, before: pd.DataFrame) -> list[dict[str, object]]:
    """One row for each budget and chooser: its plan's score on fresh examples, beside that of the sweep's."""
    vlm = load(f"embedded:{name}")
    parts = inspect(vlm, by="group.kind")
    with tempfile.TemporaryDirectory() as place:
        if len(before):
            schemes, _ = with_calibration(vlm, parts, [scheme("gptq", bits) for bits in BITS], [task])
            swept, seconds = kept(before, schemes, parts)
        else:
            swept, seconds = by_sweep(vlm, parts, task, n, seed, Path(place) / "sweep", ASKED)
        plans, costs, ran = by_plan(vlm, parts, task, n, seed, Path(place) / "plan", ASKED)
        plans, costs = {"sweep": swept, **plans}, {"sweep": seconds, **costs}
        every = list(dict.fromkeys(plan for chosen in plans.values() for plan in chosen))
        tested = sweep(vlm, parts, every, [task], Path(place) / "test", n=test, seed=TESTED)
        rows = []
        for i, bpw in enumerate(budgets(parts, ASKED.above)):
            base = tested.examples(plans["sweep"][i])
            assert base is not None
            for chooser, chosen in plans.items():
                frame = tested.examples(chosen[i])
                assert frame is not None
                both = frame.merge(base, on="example", suffixes=("", "_base"))
                gain = paired_difference(both["score"], both["score_base"], both["cluster"])
                rows.append({
                    "model": name, "task": task, "seed": seed, "n": n, "bpw": bpw, "chooser": chooser,
                    "score": round(float(both["score"].mean()), 4), "to_sweep": round(gain.mean, 4),
                    "se": round(gain.se, 4), "cpu_s": round(costs[chooser], 1),
                    "plans_run": {"plan": ran, "sweep": TRIALS}.get(chooser, 0),
                    "tested_on": len(both), "plan": chosen[i].describe(),
                })  # fmt: skip
    return rows


def error_of_mean(rows: pd.DataFrame) -> float:
    """The standard error of a mean over rows of one model and task, at most.

    Their plans ran on the same examples and are much alike, so that errors do not average out over rows.
    """
    return float(rows["se"].mean())


def summary(table: pd.DataFrame) -> str:
    lines = ["| model | task | examples | chooser | mean difference to the sweep's | worst budget | "
             "of sweep's CPU seconds |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for (model, task, n), rows in table.groupby(["model", "task", "n"]):
        whole = rows[rows["chooser"] == "sweep"]["cpu_s"].mean()
        for chooser, own in rows.groupby("chooser", sort=False):
            worst = own.loc[own["to_sweep"].idxmin()]
            lines.append(
                f"| {model} | {task} | {n} | {chooser} | {own['to_sweep'].mean():+.4f} ± {error_of_mean(own):.4f} | "
                f"{worst['to_sweep']:+.4f} ± {worst['se']:.4f} ({worst['bpw']:g} bpw, seed {worst['seed']}) | "
                f"{own['cpu_s'].mean() / whole:.0%} of {whole:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="scenes-llava-heavy")
    parser.add_argument("--task", default="vqa")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame()
    for name in args.models.split(","):
        for seed in map(int, args.seeds.split(",")):
            same = np.zeros(len(table), dtype=bool)
            if len(table):
                same = (table[["model", "task", "seed"]] == [name, args.task, seed]).all(axis=1).to_numpy()
            if args.again or not same.any():
                more = compared(name, args.task, seed, args.n, args.test, table[same])
                table = pd.concat([table[~same], pd.DataFrame(more)], ignore_index=True)
                overwrite(TABLE, table.to_csv(index=False))
                print(pd.DataFrame(more).drop(columns="plan").to_string(), flush=True)
    overwrite(
        TABLE.with_suffix(".md"),
        "# A plan in minutes, beside a sweep\n\n"
        "`python -m experiments.benchmarks.quick_plans` (models, tasks and seeds as in the table): by group.kind,\n"
        f"gptq at {', '.join(map(str, BITS))} bits, a sweep of {TRIALS} plans by `--search frontier` and `recommend`,\n"
        "beside `plan` and the best plans by its scores alone. Differences are of scores on examples that no chooser\n"
        "saw, on the same examples; ± is a standard error over examples, which all budgets share, so that a mean over\n"
        "budgets is hardly surer than each. Negative: worse than the sweep's plan.\n\n"
        f"{summary(table)}\n",
    )


if __name__ == "__main__":
    main()
