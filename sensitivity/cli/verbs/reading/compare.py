"""sensitivity compare: compares two studies, or two plans, paired where both have seen the same examples."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import path_values, values
from sensitivity.cli.output.tables import print_table

if TYPE_CHECKING:
    from sensitivity.analysis.comparing.versus import Row, Versus

ABOUT = "compare two studies, or two plans by STUDY:KEY, paired where they have seen the same examples"
EXAMPLE = "sensitivity compare runs/first runs/second"
HEADS = (
    "what", "task", "A", "B", "n of A/B/both", "difference", "right → wrong", "wrong → right", "A's plan", "B's plan",
)  # fmt: skip


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    said = "a study, or STUDY:KEY for one plan of it, beside which a study stands for the same plan in it"
    for name in ("a", "b"):
        p.add_argument(name, type=values.model_or_task, metavar=name.upper(), help=said)
    p.add_argument(
        "--out",
        type=path_values.file,
        metavar="page.html",
        help="write a page: of two plans with images, of two studies with their frontiers",
    )


def run(args: argparse.Namespace) -> dict[str, object]:
    """Compare, print the rows, and write the page with --out."""
    from sensitivity.analysis.comparing.sides import both_sides
    from sensitivity.analysis.comparing.versus import compare_sides
    from sensitivity.analysis.reporting import comparison_page

    if args.out is not None:
        comparison_page.check(args.out)
    a, b = both_sides(args.a, args.b)
    comparison = compare_sides(a, b)
    if args.out is not None:
        comparison_page.write(args.out, a, b, comparison)
    if not args.json:
        _show(comparison)
        if args.out is not None:
            print(f"page: {args.out}")
    return comparison.to_json() | {"page": None if args.out is None else str(args.out)}


def _show(comparison: Versus) -> None:
    """Print the comparison: a row for each pair of plans, and what to conclude for each task."""
    for note in comparison.notes:
        print(f"note: {note}")
    paired = "" if all(row.paired.shared for row in comparison.shown) else "; unpaired: of all that each has seen"
    print_table(
        f"A: {comparison.a}; B: {comparison.b} (scores, and B minus A with 95 % intervals, on the examples that both "
        f"have seen{paired})",
        HEADS,
        [_cells(row) for row in comparison.shown],
    )
    for line in comparison.words:
        print(line)


def _cells(row: Row) -> tuple[object, ...]:
    one, d = row.paired, row.paired.difference
    a, b = one.compared
    unpaired = "" if one.shared else " unpaired"
    changes = (one.to_wrong, one.to_right) if one.shared else ("–", "–")
    return (
        row.what,
        one.task,
        f"{a.mean:.3f} at {row.a_bpw:.2f}",
        f"{b.mean:.3f} at {row.b_bpw:.2f}",
        f"{one.a.n:,}/{one.b.n:,}/{one.shared:,}",
        f"{d.signed}{unpaired}",
        *changes,
        row.a.describe(),
        row.b.describe() if row.b.key != row.a.key else "the same",
    )
