"""The page of an experiment: our figures beside the published ones, and whether they differ by more than noise."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from declared import Experiment, plan_of
from scipy import stats

from sensitivity import verbs
from sensitivity.errors import UserError
from sensitivity.models import VLM
from sensitivity.plan import Plan, Scheme
from sensitivity.readings import Readings, of_study
from sensitivity.tasks import Task
from sensitivity.trials import Study

GROUPS = 20  # of images, each left out once for the interval of a figure that is no mean over examples
CALIBRATION_N = 128


@dataclass(frozen=True)
class Reading:
    """A figure of ours with its 95 % interval; NaN where it has none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def times(self, scale: float) -> Reading:
        return Reading(self.value * scale, self.low * scale, self.high * scale)

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]")


def verdict(ours: Reading, published: float, half: float | None) -> str:
    """Whether two measurements differ by more than their intervals together allow."""
    away = published - ours.value
    mine = (ours.high if away > 0 else ours.low) - ours.value
    if math.isnan(mine):
        return "ours has no interval" + ("" if half else ", nor has theirs")
    room = math.hypot(mine, half or 0.0)
    word = "agrees" if abs(away) <= room else "differs"
    return word if half else f"{word}, by our interval alone: theirs has none"


def page(
    experiment: Experiment,
    study: Study,
    tasks: Sequence[Task],
    scheme_of: Mapping[int, Scheme],
    vlm: VLM,
    args: argparse.Namespace,
) -> list[str]:
    lines = [f"# {experiment.title}", "", f"    python experiments/{args.name}.py {command(experiment, args)}", ""]
    if args.smoke is not None:
        lines += [
            "**A smoke run: a small random model, made-up data. It shows that everything runs; its figures mean",
            "",
        ]
        lines[-2] += " nothing.**"
    counts = ", ".join(f"{one.name} {len(one.examples):,} examples" for one in tasks)
    lines += [f"{vlm.name} in {study.meta['dtype']}; {counts}; {len(study.trials())} plans, {experiment.method}.", ""]
    lines += [f"Published: {experiment.source}.", ""]
    for one in tasks:
        lines += [f"* {one.name}: {note}" for note in one.notes]
    lines += ["", *scores(experiment, study, tasks, scheme_of, args.smoke is not None)]
    lines += importance(experiment, study)
    for head, texts in (("What to know of the published figures", experiment.traps), ("Left out", experiment.missing)):
        lines += [f"## {head}", "", *(f"* {text}" for text in texts), ""] if texts else []
    return lines


def command(experiment: Experiment, args: argparse.Namespace) -> str:
    """The arguments that do the same again."""
    if args.smoke is not None:
        return "--smoke"
    named = {"model": args.model, "data": args.data, "n": args.n, "seed": args.seed}
    usual = {"device": "cpu", "dtype": experiment.dtype, "plans": None, "calibration_n": CALIBRATION_N}
    named |= {name: getattr(args, name) for name, value in usual.items() if getattr(args, name) != value}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in named.items())


def scores(
    experiment: Experiment, study: Study, tasks: Sequence[Task], scheme_of: Mapping[int, Scheme], quick: bool
) -> list[str]:
    """Without the slow metrics where it must be `quick`."""
    lines = ["## Scores", ""]
    if not experiment.figures:
        return [*lines, "No score is published as a number: only in figures.", ""]
    table = study.table().set_index("key")
    spread = f"The published interval: {experiment.spread}." if experiment.spread else "Published without intervals."
    lines += [f"{spread} Differences are ours less theirs.", ""]
    lines += ["| plan | measure | ours | published | difference | |", "|---|---|---|---|---|---|"]
    for figure in experiment.figures:
        asked = tasks[figure.of]
        plan = plan_of(study.parts, figure.plan, scheme_of)
        what = f"{asked.name} {figure.metric or experiment.unit}".strip()
        start = f"| {', '.join(f'{k} {v}' for k, v in figure.plan.items()) or 'full precision'} | {what} |"
        theirs = f"{figure.value:g}" + (f" ± {figure.half:g}" if figure.half else "")
        if plan.key not in table.index or (quick and figure.metric in asked.slow):
            lines.append(f"{start} not run | {theirs} | | |")
            continue
        ours = reading(study, asked, plan, figure.metric, table.loc[plan.key]).times(experiment.scale)
        if math.isnan(ours.value):
            lines.append(f"{start} not measured | {theirs} | | |")
            continue
        said = verdict(ours, figure.value, figure.half)
        lines.append(f"{start} {ours} | {theirs} | {ours.value - figure.value:+.3f} | {said} |")
    return [*lines, ""]


def reading(study: Study, asked: Task, plan: Plan, metric: str, row: pd.Series) -> Reading:
    """The score with the study's interval; of another metric, by leaving out a twentieth of the images at a time."""
    if not metric:
        return Reading(row[asked.name], row[f"{asked.name}.low"], row[f"{asked.name}.high"])
    rows = study.examples(plan)
    if rows is None or metric not in asked.metrics:
        return Reading(math.nan)
    rows = rows[rows["task"] == asked.name]
    said = dict(zip(rows["example"], rows["answer"], strict=True))
    examples = [example for example in asked.examples if example.id in said]
    images = {cluster: i % GROUPS for i, cluster in enumerate(dict.fromkeys(e.cluster for e in examples))}

    def measured(left_out: int | None) -> float:
        some = [e for e in examples if images[e.cluster] != left_out]
        return float(asked.metrics[metric]([said[e.id] for e in some], some))

    value = measured(None)
    if metric in asked.slow or len(images) < 2 * GROUPS:
        return Reading(value)
    without = np.array([measured(group) for group in range(GROUPS)])
    error = math.sqrt((GROUPS - 1) / GROUPS * float(((without - without.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.975, GROUPS - 1)) * error
    return Reading(value, value - half, value + half)


def importance(experiment: Experiment, study: Study, bootstraps: int = 100) -> list[str]:
    """The consensus importance of the parts beside the published one, which has no interval."""
    if not experiment.shares:
        return []
    lines = ["## Importance of the parts, per cent", ""]
    for metric, published in experiment.shares.items():
        lines += [f"### {metric or experiment.unit}", ""]
        try:
            found = verbs.rank(readings(study, metric), bootstraps=bootstraps, thorough=False).table
        except UserError as error:
            lines += [f"Not ranked here: {error}. Published: {_listed(published)}.", ""]
            continue
        lines += ["| part | ours | published | difference | |", "|---|---|---|---|---|"]
        for part, share in published.items():
            row = found.loc[part]
            ours = Reading(row["consensus"], row["consensus.low"], row["consensus.high"])
            lines.append(f"| {part} | {ours} | {share:g} | {ours.value - share:+.1f} | {verdict(ours, share, None)} |")
        lines.append("")
    return lines


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{part} {share:g}" for part, share in shares.items())


def readings(study: Study, metric: str) -> Readings:
    """What a ranking reads of a study: bits of the parts, and its first task's score or another of its metrics."""
    found = of_study(study, study.tasks[0])
    if not metric:
        return found
    column = f"{study.tasks[0]}.{metric}"
    values = study.table().set_index("key").reindex(columns=[column])[column]
    score = np.array([values[key] for key in found.keys], dtype=float)
    return replace(found, task=column, score=score).where(np.isfinite(score))
