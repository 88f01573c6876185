"""sensitivity speculate: how many drafted tokens are accepted if the activations of a component are rounded (QSpec)."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

from sensitivity.cli.arguments import flags, values
from sensitivity.cli.arguments.model_and_tasks import loaded
from sensitivity.cli.arguments.scheme_flags import checked
from sensitivity.cli.output.progress import show_stages
from sensitivity.cli.output.tables import print_table

ABOUT = "say how sensitive each component is to the bits of its activations: the share of drafted tokens accepted"
EXAMPLE = "sensitivity speculate embedded:scenes-llava --task caption --activation-bits 3,4 --n 20"
ALL = "*"  # the pattern of all components


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_model(p)
    flags.add_tasks(p)
    flags.add_granularity(p, "part")
    flags.add_methods(p, (4,), "rtn")
    p.add_argument(
        "--activation-bits",
        type=values.comma_separated(values.whole(2, 8)),
        default=(4,),
        metavar="B,B,...",
        help="widths to which drafts round the inputs of layers, 2 to 8 (default: 4)",
    )
    p.add_argument(
        "--draft",
        type=values.draft,
        default=3,
        metavar="N",
        help="tokens that are drafted before a pass verifies them (default: 3)",
    )
    flags.add_samples(p, 100)
    flags.add_calibration(p)
    flags.add_device(p)
    p.set_defaults(include=(), whole_answers=False, dry_run=False, runtime=None, out=None, activation_scale=None)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Draft and verify answers with each component rounded, and with all of them."""
    from sensitivity.api.sweeping import with_calibration
    from sensitivity.measure.generate.batches import check_tasks_fit
    from sensitivity.measure.speculation import acceptance, check_drafts
    from sensitivity.spec.plan import Plan

    requested, needs_calibration = checked(args, "grid")
    if not needs_calibration:
        idle = ("--calibration", "--calibration-n", "--path", "--cache-gb")
        flags.without_effect(args, idle, f"with --method {args.method}, which is not calibrated")
    weights = list(dict.fromkeys(one.without_rounding for one in requested))
    vlm, parts, tasks = loaded(args)
    for one in tasks:
        check_drafts(vlm, one)
    check_tasks_fit(vlm, tasks)
    data = args.calibration or args.task
    with show_stages(args.json):
        schemes, statistics = with_calibration(
            vlm, parts, weights, data, args.calibration_n, args.seed, args.path, tasks, args.cache_gb
        )
    rows: list[dict[str, Any]] = []
    for scheme in schemes:
        plan = Plan.uniform(parts, scheme)
        for one in tasks:
            patterns = [*parts.names, ALL]
            for pattern, bits, found in acceptance(
                vlm, parts, plan, one, args.activation_bits, patterns, args.draft, statistics
            ):
                error = found.error if math.isfinite(found.error) else None
                rows.append(
                    {"weights": str(scheme), "task": one.name, "component": pattern, "activations": bits,
                     "drafted": found.drafted, "accepted": found.accepted, "rate": found.rate, "error": error,
                     "images": len(set(found.clusters))}
                )  # fmt: skip
                if not args.json:
                    rounded = "all" if pattern == ALL else pattern
                    print(f"{scheme}, {one.name}: {rounded} at {bits} bits, {found.rate:.3f} accepted", file=sys.stderr)
    if not args.json:
        show(rows, args.draft)
    return {"model": vlm.name, "draft": args.draft, "rates": rows}


def show(rows: list[dict[str, Any]], draft: int) -> None:
    """Print a row for each component, and a column for each width."""
    widths = list(dict.fromkeys(row["activations"] for row in rows))
    found = {(row["weights"], row["task"], row["component"], row["activations"]): row for row in rows}
    kinds = list(dict.fromkeys(key[:3] for key in found))
    print_table(
        f"Share of drafted tokens that are accepted, {draft} at a time, plus or minus a standard error over images",
        ("weights", "task", "images", "rounded", *(f"{bits} bits" for bits in widths)),
        [
            (
                weights,
                name,
                f"{found[weights, name, component, widths[0]]['images']:,}",
                "all" if component == ALL else component,
                *(_rate(found[weights, name, component, bits]) for bits in widths),
            )
            for weights, name, component in kinds
        ],
    )


def _rate(row: dict[str, Any]) -> str:
    """An acceptance rate with its standard error; unknown for one image, and where all or no drafts are right."""
    if row["error"] is None:
        return f"{row['rate']:.3f}"
    if row["accepted"] in (0, row["drafted"]):
        return f"{row['rate']:.3f} ({row['accepted']} of {row['drafted']})"
    return f"{row['rate']:.3f} ± {row['error']:.3f}"
