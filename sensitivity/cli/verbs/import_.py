"""sensitivity import: turns a CSV table of bits and scores into a study."""

from __future__ import annotations

import argparse
import sys

from sensitivity.cli.arguments import flags, path_values, values
from sensitivity.cli.output.tables import print_frontier
from sensitivity.spec.errors import shell_word

ABOUT = "turn a CSV table of bits and scores into a study that rank, recommend and report accept"
EXAMPLE = "sensitivity import table.csv --part vit_bits=vision --part llm_bits=language --score cider --out runs/table"

# flag -> (metavar, help); each flag may be repeated
PAIRS = {
    "--part": ("COLUMN=COMPONENT", "a column that holds bits"),
    "--switch": (
        "COLUMN=COMPONENT",
        "a column that says whether a component was quantized; its bit width is in the column of --bits",
    ),
    "--kinds": ("VALUE=KIND[,KIND]", "with --kind: what its values mean, such as MLP=ff or BOTH=attn,ff"),
    "--numel": ("COMPONENT=N", "how many weights a component has, from which bpw and megabytes are computed"),
}


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    p.add_argument(
        "table",
        type=path_values.path,
        metavar="TABLE.csv",
        help="one row per trial; the score of a plan with several rows is their mean",
    )
    for flag, (metavar, about) in PAIRS.items():
        kind = values.pair_of(values.count) if flag == "--numel" else values.pair
        p.add_argument(flag, type=kind, action="append", default=[], metavar=metavar, help=about)
    p.add_argument("--bits", type=values.name, metavar="COLUMN", help="with --switch: the column of bits")
    p.add_argument(
        "--kind",
        type=values.name,
        metavar="COLUMN",
        help="with --switch: the column that says attention, feed-forward or both",
    )
    p.add_argument(
        "--score",
        type=values.name,
        action="append",
        default=[],
        metavar="COLUMN",
        help="a column to read as a task's score",
    )
    p.add_argument("--total", type=values.weights, metavar="N", help="weights of the whole model, kept ones included")
    p.add_argument("--method", type=values.name, default="codes", help="what to call the method of quantization")
    p.add_argument("--model", type=values.name, help="what to call the model (default: the table's name)")
    p.add_argument(
        "--out", type=path_values.out_folder, required=True, metavar="runs/NAME", help="folder of the new study"
    )


def run(args: argparse.Namespace) -> dict[str, object]:
    """Turn the table into a study, and print its frontier."""
    from sensitivity.formats.writing.unfinished import remove_unfinished
    from sensitivity.spec.errors import UserError
    from sensitivity.study.importing.columns import Switches
    from sensitivity.study.importing.imported_study import import_table

    switches = None
    for flag in PAIRS:
        flags.distinct(flag, getattr(args, flag.removeprefix("--")))
    if not args.switch:
        flags.without_effect(args, ["--bits", "--kind"], "without --switch")
    if args.kinds and not args.kind:
        raise UserError("--kinds would do nothing without --kind COLUMN, whose values it explains; leave it out")
    if args.switch:
        if not args.bits:
            raise UserError("--switch needs --bits COLUMN, the column with the bit width of what was quantized")
        kinds = {value: tuple(kind.split(",")) for value, kind in args.kinds} or None
        switches = Switches(dict(args.switch), args.bits, args.kind, kinds)
    if left := remove_unfinished(args.out.parent, but=args.out):
        print(f"removed what killed processes left: {', '.join(map(str, left))}", file=sys.stderr)
    imported = import_table(
        args.table, args.out, args.score, parts=dict(args.part) or None, switches=switches,
        numel=dict(args.numel) or None, total=args.total, method=args.method, model=args.model,
    )  # fmt: skip
    if not args.json:
        print(f"{imported.used} of {imported.rows} rows became trials in {args.out}")
        for note in imported.notes:
            print(f"  note: {note}")
        print_frontier(imported.study)
        print(f"next: sensitivity rank {shell_word(args.out)}")
    return imported.to_json()
