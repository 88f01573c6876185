"""What the published experiments share: arguments, the sweep, and a page where our figures stand beside the published.

An experiment is a short file that declares an Experiment and calls main(); it needs the weights and the data:

    python experiments/blip2_gptq_coco.py --data COCO [--model MODEL] [--dry-run]
    python experiments/blip2_gptq_coco.py --smoke     # a small random model, made-up data: shows that it runs
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from sensitivity import terminal, verbs
from sensitivity.cli import words
from sensitivity.components import PARTS, ComponentMap
from sensitivity.errors import UserError
from sensitivity.models import VLM
from sensitivity.models.blank import blank
from sensitivity.plan import Plan, Scheme
from sensitivity.preflight import foresee
from sensitivity.quantize import scheme
from sensitivity.readings import Readings, of_study
from sensitivity.tasks import Task, task
from sensitivity.trials import NATIVE, Study

ROOT = Path(__file__).parent.parent
GROUPS = 20  # of images, each left out once for the interval of a figure that is no mean over examples
SMOKE_N, SMOKE_PLANS = 6, 3


@dataclass(frozen=True)
class Figure:
    """One published figure: a plan (patterns over components -> bits; empty is full precision), a metric, a value."""

    plan: Mapping[str, int]
    value: float
    metric: str = ""  # one of the task's further metrics; empty for its score
    of: int = 0  # which of the experiment's tasks
    half: float | None = None  # half the width of its 95 % interval; None where none was published


@dataclass(frozen=True)
class Experiment:
    """What is run, and what was published about it."""

    title: str
    source: str
    model: str
    small: str  # which small model stands in for it in a smoke run
    tasks: tuple[str, ...]  # as --task takes them, with {data} for the folder
    method: str
    unit: str = ""  # what the score is called where it is published
    grid: Mapping[str, tuple[int, ...]] | None = None  # all combinations of these widths of these parts
    alone: tuple[int, ...] = ()  # or: each component alone at these widths
    by: str = "part"
    n: int = 1000
    scale: float = 1.0  # published figures are this many times ours: 100 where they are per cent
    figures: tuple[Figure, ...] = ()
    spread: str = ""  # where the published figures' interval comes from
    shares: Mapping[str, Mapping[str, float]] | None = None  # metric, or empty for the score: shares of the parts, %
    traps: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # what was published and is not run here, and why
    dtype: str | None = None

    def plans(self, parts: ComponentMap, scheme_of: Mapping[int, Scheme]) -> list[Plan]:
        """Full precision, the plans of the published figures, and the grid; in data-flow order."""
        choices: list[Mapping[str, int]] = [{}, *(figure.plan for figure in self.figures)]
        if self.grid:
            choices += [dict(zip(self.grid, row, strict=True)) for row in itertools.product(*self.grid.values())]
        choices += [{name: width} for name in parts.names for width in self.alone]
        return list(dict.fromkeys(plan_of(parts, one, scheme_of) for one in choices))

    @property
    def widths(self) -> list[int]:
        used = {width for figure in self.figures for width in figure.plan.values()} | set(self.alone)
        used |= {width for widths in (self.grid or {}).values() for width in widths}
        return sorted(used - {NATIVE})


def alone(pattern: str, values: Mapping[int, float], **more: Any) -> tuple[Figure, ...]:
    """Published figures of one part, all others at native precision, by width; "*" is all parts together."""
    return tuple(Figure({pattern: width}, value, **more) for width, value in values.items())


def mixed(values: Mapping[tuple[int, ...], float], **more: Any) -> tuple[Figure, ...]:
    """Published figures of plans by the widths of vision, connector and language model."""
    return tuple(Figure(dict(zip(PARTS, widths, strict=False)), value, **more) for widths, value in values.items())


def plan_of(parts: ComponentMap, choice: Mapping[str, int], scheme_of: Mapping[int, Scheme]) -> Plan:
    return Plan.of(parts, {pattern: scheme_of.get(width) for pattern, width in choice.items()})


# -- running


def main(experiment: Experiment, file: str, argv: Sequence[str] | None = None) -> None:
    """`file` is the experiment's own, by whose name its study goes."""
    args = arguments(experiment).parse_args(argv, argparse.Namespace(name=Path(file).stem))
    try:
        with stage(experiment, args):
            run(experiment, args)
    except UserError as error:
        sys.exit(f"error: {error}")


def arguments(experiment: Experiment) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=f"{experiment.title}.")
    p.add_argument("--model", default=experiment.model, help=f"a folder or hub name (default: {experiment.model})")
    p.add_argument("--data", help="the folder where the data set is, in its official layout")
    most = f"examples per task, drawn with the seed (default: {experiment.n:,}, or all there are)"
    p.add_argument("--n", type=int, default=experiment.n, help=most)
    p.add_argument("--seed", type=int, default=0, help="of the examples (default: 0)")
    words.device(p)
    p.add_argument("--out", type=Path, help="where study and report go (default: runs/ and the name of this file)")
    p.add_argument("--plans", type=int, metavar="N", help="at most N plans, the published first (default: all)")
    p.add_argument(
        "--calibration-n", type=int, default=128, metavar="N", help="examples to calibrate on (default: 128)"
    )
    p.add_argument("--dry-run", action="store_true", help="predict time, disk and memory; no weights are loaded")
    p.add_argument("--json", action="store_true", help="with --dry-run: print one JSON object")
    p.add_argument(
        "--smoke", nargs="?", const="", metavar="FOLDER", help="a small random model and data, made in FOLDER"
    )
    p.set_defaults(dtype=experiment.dtype)
    return p


@contextmanager
def stage(experiment: Experiment, args: argparse.Namespace) -> Iterator[None]:
    """The model and the data that are named; in a smoke run small ones, made in a folder that may be used again."""
    if args.smoke is None:
        if args.data is None:
            names = " and ".join(one.partition(":")[0] for one in experiment.tasks)
            raise UserError(f"type --data FOLDER, where {names} is, or --smoke")
        args.out = args.out or ROOT / "runs" / args.name
        yield
        return
    from small import datasets, models

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.smoke or temporary)
        model, data = folder / "models" / experiment.small, folder / "data"
        if not model.exists():
            models.save(experiment.small, model)
        for one in experiment.tasks:
            name, _, where = one.format(data=data / experiment.tasks[0].partition(":")[0]).partition(":")
            if not Path(where).exists():
                datasets.WRITE[name](Path(where))
        args.model, args.data = str(model), str(data / experiment.tasks[0].partition(":")[0])
        args.n, args.calibration_n, args.plans = min(args.n, SMOKE_N), 4, args.plans or SMOKE_PLANS
        args.out = args.out or folder / "runs" / args.name
        yield


def run(experiment: Experiment, args: argparse.Namespace) -> None:
    names = [one.format(data=args.data) for one in experiment.tasks]
    chosen = [task(name, n=args.n, seed=args.seed) for name in names]
    schemes = [scheme(experiment.method, width) for width in experiment.widths]
    if args.dry_run:
        vlm = blank(args.model)
        parts = verbs.inspect(vlm, by=experiment.by)
        plans = to_run(experiment, parts, schemes, args.plans)
        how = {"calibration": args.calibration_n, "device": args.device, "dtype": args.dtype}
        found = foresee(vlm, parts, plans, chosen, **how)
        print(json.dumps(found.to_json(), indent=2)) if args.json else terminal.forecast(found)
        return
    vlm = verbs.load(args.model, device=args.device, dtype=args.dtype)
    parts = verbs.inspect(vlm, by=experiment.by)
    schemes, statistics = verbs.calibrated(
        vlm, parts, schemes, names, n=args.calibration_n, seed=args.seed, against=chosen
    )
    scheme_of = dict(zip(experiment.widths, schemes, strict=True))
    plans = to_run(experiment, parts, schemes, args.plans)
    study = verbs.sweep(vlm, parts, plans, names, args.out, n=args.n, seed=args.seed, statistics=statistics)
    lines = page(experiment, study, chosen, scheme_of, vlm, args)
    (args.out / "published.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if args.smoke is None:
        verbs.report(study, args.out / "report")
    print("\n".join(lines))


def to_run(experiment: Experiment, parts: ComponentMap, schemes: Sequence[Scheme], most: int | None) -> list[Plan]:
    """At most so many plans beside full precision: those that were published, then evenly from the others."""
    scheme_of = dict(zip(experiment.widths, schemes, strict=True))
    plans = experiment.plans(parts, scheme_of)
    published = len({plan_of(parts, figure.plan, scheme_of) for figure in experiment.figures if figure.plan})
    if most is None or len(plans) <= most + 1:
        return plans
    first, others = plans[: min(published, most) + 1], plans[published + 1 :]
    chosen = np.linspace(0, len(others) - 1, most + 1 - len(first)).round().astype(int)
    return [*first, *(others[i] for i in chosen)]


# -- the page


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
    words_of = [f"--model {args.model}", f"--data {args.data}", f"--n {args.n}", f"--seed {args.seed}"]
    lines = [f"# {experiment.title}", "", f"    python experiments/{args.name}.py {' '.join(words_of)}", ""]
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
            lines += [f"Not ranked here: {error}. Published: {json.dumps(published)}.", ""]
            continue
        lines += ["| part | ours | published | difference | |", "|---|---|---|---|---|"]
        for part, share in published.items():
            row = found.loc[part]
            ours = Reading(row["consensus"], row["consensus.low"], row["consensus.high"])
            lines.append(f"| {part} | {ours} | {share:g} | {ours.value - share:+.1f} | {verdict(ours, share, None)} |")
        lines.append("")
    return lines


def readings(study: Study, metric: str) -> Readings:
    """What a ranking reads of a study: bits of the parts, and its first task's score or another of its metrics."""
    found = of_study(study, study.tasks[0])
    if not metric:
        return found
    column = f"{study.tasks[0]}.{metric}"
    values = study.table().set_index("key").reindex(columns=[column])[column]
    score = np.array([values[key] for key in found.keys], dtype=float)
    return replace(found, task=column, score=score).where(np.isfinite(score))
