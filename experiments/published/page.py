"""The page of a published study: our scores beside the published ones, and whether they differ by more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from experiments.published.declaration import PublishedScore, PublishedStudy, plan_of
from sensitivity.analysis.importance.ranking import rank
from sensitivity.analysis.observations import Observations, observations_of
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Task

GROUPS = 20  # groups of images for the jackknife of a metric that is no mean over examples


@dataclass(frozen=True)
class Measured:
    """Our value with its 95 % interval; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def times(self, scale: float) -> Measured:
        return Measured(self.value * scale, self.low * scale, self.high * scale)

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]")


def verdict(ours: Measured, published: float, half_width: float | None) -> str:
    """Whether two independent measurements differ by more than the 95 % interval of their difference."""
    difference = published - ours.value
    # an interval may be lopsided: the side that faces the published value counts
    ours_half = (ours.high if difference > 0 else ours.low) - ours.value
    if math.isnan(ours_half):
        return "ours has no interval" + ("" if half_width else ", nor has the published score")
    word = "agrees" if abs(difference) <= math.hypot(ours_half, half_width or 0.0) else "differs"
    return word if half_width else f"{word}, by our interval alone: the published score has none"


def page(
    study: PublishedStudy,
    measured: Study,
    tasks: Sequence[Task],
    scheme_of: Mapping[int, Scheme],
    command: str,
    smoke: bool,
) -> list[str]:
    lines = [f"# {study.title}", "", f"    {command}", ""]
    if smoke:
        lines += ["**A smoke run on a small random model and invented data: it shows that everything runs, and its"]
        lines += ["scores mean nothing.**", ""]
    counts = ", ".join(f"{one.name} {len(one.examples):,} examples" for one in tasks)
    about = f"{measured.meta['model']} in {measured.meta['dtype']}"
    lines += [f"{about}; {counts}; {len(measured.trials())} plans, {study.method}.", ""]
    lines += [f"Published: {study.source}.", ""]
    for one in tasks:
        lines += [f"* {one.name}: {note}" for note in one.notes]
    lines += ["", *scores(study, measured, tasks, scheme_of, smoke), *importance(study, measured)]
    for head, texts in (("Caveats about the published scores", study.caveats), ("Not run here", study.missing)):
        lines += [f"## {head}", "", *(f"* {text}" for text in texts), ""] if texts else []
    return lines


def scores(
    study: PublishedStudy, measured: Study, tasks: Sequence[Task], scheme_of: Mapping[int, Scheme], quick: bool
) -> list[str]:
    """A table of our scores and the published ones; `quick` leaves out metrics that take long to compute."""
    lines = ["## Scores", ""]
    if not study.scores:
        return [*lines, "No score is published as a number, only in figures.", ""]
    table = measured.table().set_index("key")
    told = f"The published interval: {study.intervals}." if study.intervals else "Published without intervals."
    lines += [f"{told} The difference is ours minus the published score.", ""]
    lines += ["| plan | metric | ours | published | difference | |", "|---|---|---|---|---|---|"]
    for score in study.scores:
        of, plan = tasks[score.task], plan_of(measured.parts, score.plan, scheme_of)
        start, published = _labels(study, score, of)
        if plan.key not in table.index or (quick and score.metric in of.slow):
            lines.append(f"{start} not run | {published} | | |")
            continue
        ours = measure(measured, of, plan, score.metric, table.loc[plan.key]).times(study.scale)
        if math.isnan(ours.value):
            lines.append(f"{start} not measured | {published} | | |")
            continue
        said = verdict(ours, score.value, score.half_width)
        lines.append(f"{start} {ours} | {published} | {ours.value - score.value:+.3f} | {said} |")
    return [*lines, ""]


def _labels(study: PublishedStudy, score: PublishedScore, of: Task) -> tuple[str, str]:
    """The first two cells of a row, and the published score's."""
    plan = ", ".join(f"{name} {width}" for name, width in score.plan.items()) or "full precision"
    metric = f"{of.name} {score.metric or study.unit}".strip()
    return f"| {plan} | {metric} |", f"{score.value:g}" + (f" ± {score.half_width:g}" if score.half_width else "")


def measure(measured: Study, of: Task, plan: Plan, metric: str, row: pd.Series) -> Measured:
    """The task's score with the study's interval; another metric with a jackknife interval over groups of images.

    A metric such as CIDEr is no mean over examples, so it has no standard error of its own: it is computed again
    twenty times, each time without a twentieth of the images (the delete-a-group jackknife).
    """
    if not metric:
        return Measured(row[of.name], row[f"{of.name}.low"], row[f"{of.name}.high"])
    rows = measured.examples(plan)
    if rows is None or metric not in of.metrics:
        return Measured(math.nan)
    rows = rows[rows["task"] == of.name]
    answers = dict(zip(rows["example"], rows["answer"], strict=True))
    examples = [example for example in of.examples if example.id in answers]
    group_of = {cluster: i % GROUPS for i, cluster in enumerate(dict.fromkeys(e.cluster for e in examples))}

    def value(left_out: int | None) -> float:
        some = [e for e in examples if group_of[e.cluster] != left_out]
        return float(of.metrics[metric]([answers[e.id] for e in some], some))

    every = value(None)
    if metric in of.slow or len(group_of) < 2 * GROUPS:
        return Measured(every)
    without = np.array([value(group) for group in range(GROUPS)])
    error = math.sqrt((GROUPS - 1) / GROUPS * float(((without - without.mean()) ** 2).sum()))
    half_width = float(stats.t.ppf(0.975, GROUPS - 1)) * error
    return Measured(every, every - half_width, every + half_width)


def importance(study: PublishedStudy, measured: Study, bootstraps: int = 100) -> list[str]:
    """Our consensus importance of the parts beside the published one, which has no interval."""
    if not study.shares:
        return []
    lines = ["## Importance of the parts, percent", ""]
    for metric, published in study.shares.items():
        lines += [f"### {metric or study.unit}", ""]
        try:
            found = rank(observations(measured, metric), bootstraps=bootstraps, thorough=False).table
        except UserError as error:
            listed = ", ".join(f"{part} {share:g}" for part, share in published.items())
            lines += [f"Not ranked here: {error}. Published: {listed}.", ""]
            continue
        lines += ["| part | ours | published | difference | |", "|---|---|---|---|---|"]
        for part, share in published.items():
            row = found.loc[part]
            ours = Measured(row["consensus"], row["consensus.low"], row["consensus.high"])
            lines.append(f"| {part} | {ours} | {share:g} | {ours.value - share:+.1f} | {verdict(ours, share, None)} |")
        lines.append("")
    return lines


def observations(measured: Study, metric: str) -> Observations:
    """The bits of every part and the first task's score, or another of its metrics, for `rank`."""
    found = observations_of(measured, measured.tasks[0])
    if not metric:
        return found
    column = f"{measured.tasks[0]}.{metric}"
    values = measured.table().set_index("key").reindex(columns=[column])[column]
    score = np.array([values[key] for key in found.keys], dtype=float)
    return replace(found, task=column, score=score).where(np.isfinite(score))
