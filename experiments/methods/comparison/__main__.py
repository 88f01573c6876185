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
from collections.abc import Iterator, Sequence
from itertools import product
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
    widths_of,
)
from sensitivity.api.sweeping import sweep, with_calibration
from sensitivity.measure.install.plan_in_model import prepare
from sensitivity.measure.loop import data_flow_order
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.quantize.methods import method_of, needs_fisher
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.table import task


def measure(what: str, wanted: Sequence[Cell], asked: Task, args: argparse.Namespace, ends: float) -> Record:
    """The cells of one model that are whole when the time is over; what a killed run measured is not run again."""
    model = wanted[0].model
    vlm = load(model)
    parts = inspect(vlm, by="part")
    # the rows of this portion at all widths that were asked for, since a layer is solved at all of them at once
    widths = {cell.bits for cell in wanted} | {int(bits) for bits in args.widths.split(",")}
    keys = [
        (row, bits) for row in dict.fromkeys(cell.row for cell in wanted) for bits in widths_of(row) if bits in widths
    ]
    bare, path = [scheme_of(*key) for key in keys], "both" if what == BOTH else "float"
    named, statistics = with_calibration(vlm, parts, bare, [asked.name], n=args.examples, path=path, against=[asked])
    schemes = dict(zip(keys, named, strict=True))
    # codes are left in the cache on disk, where the portions of other widths find them
    solved = [one for one in named if what == WEIGHTS and method_of(one).calibrated and not needs_fisher(one)]
    prepare(vlm.model, parts, [plan_of(parts, "all", one) for one in solved], WeightCodes(), statistics)
    plans = {cell: plan_of(parts, cell.where, schemes[cell.row, cell.bits]) for cell in wanted}

    def in_time() -> Iterator[Plan]:
        for plan in sorted(set(plans.values()), key=data_flow_order):
            if time.monotonic() >= ends:
                return
            yield plan

    out = Path(args.work) / f"{model.removeprefix('embedded:')}-{path}-{asked.name}-{args.n}-{args.examples}"
    study = sweep(vlm, parts, in_time(), [asked.name], out, n=args.n, statistics=statistics)
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
    for one, (what, portion) in product(asked, portions):
        lacking = [cell for cell in portion if cell not in known or one.name not in known[cell].right]
        if lacking and time.monotonic() < ends:
            known = merged(known, measure(what, lacking, one, args, ends))
            record.write(args.record, known, args.examples)
            print(f"{one.name}, {lacking[0].model}, {what}, {lacking[0].bits} bits", file=sys.stderr, flush=True)
    models = list(dict.fromkeys([*MODELS, *args.models.split(",")]))
    every = [cell for _, portion in cells(models, ROWS, WIDTHS, WHERE) for cell in portion]
    lines = page.page(known, every, [task(name, n=args.n) for name in TASKS], args.examples)
    overwrite(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
