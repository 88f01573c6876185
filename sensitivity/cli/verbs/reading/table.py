"""sensitivity table: writes a study as a tidy table, or as a folder for a hub, with a data-set card."""

from __future__ import annotations

import argparse

from sensitivity.cli.arguments import flags, path_values
from sensitivity.spec.errors import UserError, shell_word

ABOUT = "write a study as a table for other programs, or as a folder from which others choose plans"
PUSH = "hf upload OWNER/NAME {} --repo-type dataset"
EXAMPLE = "sensitivity table runs/first --out trials.parquet"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_study(p)
    p.add_argument(
        "--out",
        type=path_values.file,
        metavar="trials.parquet|csv",
        help="where to write; a card beside it (trials.parquet.md) says what the columns mean",
    )
    p.add_argument(
        "--share",
        type=path_values.out_folder,
        metavar="FOLDER",
        help="instead of --out: a folder for a hub, with the table, a card and the trials of the study, from which"
        " others choose plans for budgets of their own without a GPU",
    )
    p.add_argument(
        "--examples",
        action="store_true",
        help="one row per plan and example, with questions and answers (with --share, as a further table)",
    )
    p.add_argument("--force", action="store_true", help="replace an earlier table")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Write the table and its card, or the folder for a hub."""
    from sensitivity.study.sharing import folder, table_file
    from sensitivity.study.study import Study

    if (args.out is None) == (args.share is None):
        raise UserError("still needed: either --out, for a table, or --share, for a folder with the study itself")
    if args.share is not None:
        folder.check(args.share, args.force)
        rows = folder.write(Study(args.study), args.share, args.examples)
        if not args.json:
            print(f"{args.share}: {rows:,} rows and the study; to push it: {PUSH.format(shell_word(args.share))}")
        return {"folder": str(args.share), "card": str(args.share / folder.CARD), "rows": rows}
    table_file.check(args.out, args.force)
    rows = table_file.write(Study(args.study), args.out, args.examples)
    if not args.json:
        print(f"{args.out}: {rows:,} rows; what its columns mean: {table_file.card_of(args.out)}")
    return {"table": str(args.out), "card": str(table_file.card_of(args.out)), "rows": rows}
