"""sensitivity import: a table of bits and scores, whoever measured it, becomes a study."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sensitivity import terminal
from sensitivity.cli import words

ABOUT = "turn a CSV table of bits and scores into a study that rank, recommend and report accept"
EXAMPLE = "sensitivity import table.csv --part vit_bits=vision --part llm_bits=language --score cider --out runs/table"


# flag -> what NAME=VALUE is, and what it says; each may be repeated
PAIRS = {
    "--part": ("COLUMN=COMPONENT", "a column that holds bits"),
    "--switch": (
        "COLUMN=COMPONENT",
        "a column that says whether a component was quantised; --bits says how far",
    ),
    "--kinds": ("VALUE=KIND[,KIND]", "with --kind: what its values mean, such as MLP=ff or BOTH=attn,ff"),
    "--numel": ("COMPONENT=N", "how many weights a component has, so that bpw and megabytes can be told"),
}


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("table", type=Path, metavar="TABLE.csv", help="one row per trial; repeated plans stay repeats")
    for flag, (metavar, about) in PAIRS.items():
        p.add_argument(flag, type=words.pair, action="append", default=[], metavar=metavar, help=about)
    p.add_argument("--bits", metavar="COLUMN", help="with --switch: the column of bits")
    p.add_argument(
        "--kind", metavar="COLUMN", help="with --switch: the column that says attention, feed-forward or both"
    )
    p.add_argument("--score", action="append", default=[], metavar="COLUMN", help="a column to read as a task's score")
    p.add_argument("--total", type=int, metavar="N", help="weights of the whole model, kept ones included")
    p.add_argument("--method", default="codes", help="what to call the method of quantisation")
    p.add_argument("--model", help="what to call the model (default: the table's name)")
    p.add_argument("--out", type=Path, required=True, metavar="runs/NAME", help="where the study goes")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from sensitivity.errors import UserError
    from sensitivity.importing import Switches, import_table

    switches = None
    for flag, given in (("--part", args.part), ("--switch", args.switch), ("--kinds", args.kinds)):
        names = [name for name, _ in given]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"{flag} names '{twice.pop()}' twice")
    if args.switch:
        if not args.bits:
            raise UserError("--switch needs --bits COLUMN, the column that says how far what is on was quantised")
        kinds = {value: tuple(kind.split(",")) for value, kind in args.kinds} or None
        switches = Switches(dict(args.switch), args.bits, args.kind, kinds)
    try:
        numel = {name: int(count.replace("_", "").replace(",", "")) for name, count in args.numel}
    except ValueError as error:
        raise UserError("--numel is like vision=984023040: a component and a whole number of weights") from error
    found = import_table(
        args.table, args.out, args.score, parts=dict(args.part) or None, switches=switches, numel=numel or None,
        total=args.total, method=args.method, model=args.model,
    )  # fmt: skip
    if not args.json:
        print(f"{found.used} of {found.rows} rows became trials in {args.out}")
        for note in found.notes:
            print(f"  note: {note}")
        terminal.frontier(found.study)
        print(f"next: sensitivity rank {args.out}")
    return found.to_json()
