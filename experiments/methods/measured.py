"""Command line and sweep that the comparisons of methods share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sensitivity.api.sweeping import sweep
from sensitivity.measure.calibrate.calibration import calibration_statistics
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan
from sensitivity.study.study import Study
from sensitivity.tasks.table import task


def parser(about: str | None, name: str, n: int) -> argparse.ArgumentParser:
    """A parser with the options that all comparisons have; `name` is that of the report and of the study."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default="embedded:scenes-llava")
    found.add_argument("--n", type=int, default=n, help="examples of each task")
    found.add_argument("--examples", type=int, default=128, help="examples to calibrate on")
    found.add_argument("--work", default=f"runs/{name}")
    found.add_argument("--out", default=f"reports/{name}.md")
    return found


def measured(
    vlm: VLM,
    parts: ComponentMap,
    tasks: Sequence[str],
    plans: Callable[[Mapping[str, object]], list[Plan]],
    args: argparse.Namespace,
    path: str = "float",
) -> tuple[Study, list[Plan]]:
    """Sweep plans and return their study; a study that exists is read, not measured again.

    `plans` is a function because a plan names its calibration data, which are known only after calibration.
    """
    evaluation = [task(name, n=args.n) for name in tasks]
    statistics = calibration_statistics(vlm, parts, tasks, args.examples, path=path, against=evaluation)
    chosen = plans(statistics.facts)
    work = f"{args.work}-{path}"
    return sweep(vlm, parts, chosen, tasks, work, n=args.n, statistics=statistics), chosen


def write(out: str, lines: Sequence[str]) -> None:
    Path(out).parent.mkdir(exist_ok=True)
    overwrite(Path(out), "\n".join(lines) + "\n")
    print("\n".join(lines))
