"""Measures what the record lacks, and writes the page.

python -m experiments.methods.comparison                  # writes reports/methods-comparison.csv and .md
python -m experiments.methods.comparison --minutes 40     # begins no further row afterwards; again, and it goes on
python -m experiments.methods.comparison --minutes 0      # only the page

Options choose what is measured; the page always says what is known of all cells.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.methods.comparison import page, record
from experiments.methods.comparison.record import Measured, Record
from experiments.methods.comparison.rows import (
    BOTH,
    MODELS,
    ROWS,
    TASKS,
    WEIGHTS,
    WHERE,
    WIDTHS,
    Cell,
    cells,
    plan_of,
    scheme_of,
    stored_bits,
)
from sensitivity.api.sweeping import sweep, with_calibration
from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.install.plan_in_model import prepare
from sensitivity.measure.loop import data_flow_order
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.methods import method_of, needs_fisher
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.table import task


@dataclass(frozen=True)
class Begun:
    """A calibrated model, and the schemes of those rows that are still to be measured on it."""

    vlm: VLM
    parts: ComponentMap
    schemes: Mapping[tuple[str, int], Scheme]
    statistics: Statistics | None


def begin(what: str, model: str, keys: Sequence[tuple[str, int]], asked: Task, args: argparse.Namespace) -> Begun:
    """Calibrate once for all widths; calibrated weights are solved at all of them at once, too."""
    vlm = load(model)
    parts = inspect(vlm, by="part")
    bare, path = [scheme_of(*key) for key in keys], path_of(what)
    named, statistics = with_calibration(vlm, parts, bare, [asked.name], n=args.examples, path=path, against=[asked])
    # codes are left in the cache on disk, where the sweeps find them
    solved = [one for one in named if what == WEIGHTS and method_of(one).calibrated and not needs_fisher(one)]
    prepare(vlm.model, parts, [plan_of(parts, "all", one) for one in solved], WeightCodes(), statistics)
    return Begun(vlm, parts, dict(zip(keys, named, strict=True)), statistics)


def path_of(what: str) -> str:
    """The calibration path of rows of a kind."""
    return "both" if what == BOTH else "float"


def measure(
    what: str, begun: Begun, wanted: Sequence[Cell], asked: Task, args: argparse.Namespace, ends: float
) -> Record:
    """The cells of one model that are whole when the time is over; what a killed run measured is not run again."""
    parts, schemes, model = begun.parts, begun.schemes, wanted[0].model
    plans = {cell: plan_of(parts, cell.where, schemes[cell.row, cell.bits]) for cell in wanted}

    def in_time() -> Iterator[Plan]:
        for plan in sorted(set(plans.values()), key=data_flow_order):
            if time.monotonic() >= ends:
                return
            yield plan

    out = Path(args.work) / f"{model.removeprefix('embedded:')}-{path_of(what)}-{asked.name}-{args.n}-{args.examples}"
    study = sweep(begun.vlm, parts, in_time(), [asked.name], out, n=args.n, statistics=begun.statistics)
    found = {cell: study.examples(plan) for cell, plan in plans.items()}
    stored = {cell: stored_bits(parts, cell.where, schemes[cell.row, cell.bits]) for cell in wanted}
    whole = {cell: Measured(stored[cell], right(frame, asked)) for cell, frame in found.items() if frame is not None}
    full = study.examples(study.native)
    return {record.native(model): Measured(16.0, right(full, asked)), **whole}


def right(frame: pd.DataFrame | None, asked: Task) -> dict[str, np.ndarray]:
    """The scores of a task, in the order of its examples."""
    assert frame is not None
    scores = frame.set_index("example")["score"]
    return {asked.name: scores.loc[[example.id for example in asked.examples]].to_numpy(dtype=float)}


def lacks(known: Record, cell: Cell, asked: Task) -> bool:
    """Whether a cell is not measured on a task."""
    return cell not in known or asked.name not in known[cell].right


def merged(known: Record, found: Record) -> Record:
    """What is known of each cell, with further tasks."""
    both = {cell: {**known[cell].right, **one.right} if cell in known else one.right for cell, one in found.items()}
    return known | {cell: Measured(found[cell].stored, right) for cell, right in both.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", default=",".join(MODELS))
    p.add_argument("--tasks", default=",".join(TASKS))
    p.add_argument("--rows", default=",".join(ROWS))
    p.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    p.add_argument("--where", default=",".join(WHERE))
    p.add_argument("--n", type=int, default=500, help="examples of each task")
    p.add_argument("--examples", type=int, default=64, help="examples to calibrate on")
    p.add_argument("--minutes", type=float, default=float("inf"), help="no further row is begun afterwards")
    p.add_argument("--work", default="runs/methods-comparison")
    p.add_argument("--record", type=Path, default=Path("reports/methods-comparison.csv"))
    p.add_argument("--out", type=Path, default=Path("reports/methods-comparison.md"))
    args = p.parse_args()
    asked = [task(name, n=args.n) for name in args.tasks.split(",")]
    widths = [int(bits) for bits in args.widths.split(",")]
    portions = list(cells(args.models.split(","), args.rows.split(","), widths, args.where.split(",")))
    ends = time.monotonic() + 60 * args.minutes
    known = record.read(args.record, args.n, args.examples)
    for one in asked:
        missing = [(what, [c for c in portion if lacks(known, c, one)]) for what, portion in portions]
        begun: dict[tuple[str, str], Begun] = {}
        for what, lacking in missing:
            if not lacking or time.monotonic() >= ends:
                continue
            model = lacking[0].model
            if (what, model) not in begun:
                alike = [cell for other, some in missing if other == what for cell in some if cell.model == model]
                keys = list(dict.fromkeys((cell.row, cell.bits) for cell in alike))
                begun[what, model] = begin(what, model, keys, one, args)
            known = merged(known, measure(what, begun[what, model], lacking, one, args, ends))
            record.write(args.record, known, args.examples)
            print(f"{one.name}, {model}, {what}, {lacking[0].bits} bits", file=sys.stderr, flush=True)
    models = list(dict.fromkeys([*MODELS, *args.models.split(",")]))
    every = [cell for _, portion in cells(models, ROWS, WIDTHS, WHERE) for cell in portion]
    lines = page.page(known, every, [task(name, n=args.n) for name in TASKS], args.examples)
    overwrite(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
