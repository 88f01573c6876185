"""sensitivity table: writes a study as a tidy table, with a data-set card beside it."""

from __future__ import annotations

import argparse

from sensitivity.cli.arguments import flags, values

ABOUT = "write a study as a table for other programs, one row per plan and task, or per example"
EXAMPLE = "sensitivity table runs/first --out trials.parquet"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.study(p)
    p.add_argument(
        "--out",
        type=values.file,
        required=True,
        metavar="trials.parquet|csv",
        help="where to write; a card beside it (trials.parquet.md) says what the columns mean",
    )
    p.add_argument("--examples", action="store_true", help="one row per plan and example, with questions and answers")
    p.add_argument("--force", action="store_true", help="replace an earlier table")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Write the table and its card."""
    from sensitivity.study.sharing import table_file
    from sensitivity.study.study import Study

    table_file.check(args.out, args.force)
    rows = table_file.write(Study(args.study), args.out, args.examples)
    if not args.json:
        print(f"{args.out}: {rows:,} rows; what its columns mean: {table_file.card_of(args.out)}")
    return {"table": str(args.out), "card": str(table_file.card_of(args.out)), "rows": rows}
