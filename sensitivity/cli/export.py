"""sensitivity export: a plan as files that a runtime loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

ABOUT = "write a plan as files that a runtime loads"
EXAMPLE = "sensitivity export runs/first --bpw 4.0 --format plan --out out/plan.json"


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", type=Path, metavar="STUDY|plan.json", help="a study, or a plan that was recommended")
    p.add_argument("--bpw", type=float, metavar="X", help="the budget, where the source is a study")
    p.add_argument("--format", default="plan", help="what to write (default: plan)")
    p.add_argument("--out", type=Path, required=True, help="the folder to write")
    p.add_argument("--force", action="store_true", help="write over what is there")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from sensitivity import verbs

    path = verbs.export_from(args.source, args.bpw, args.out, args.format, args.force)
    if not args.json:
        print(f"wrote {path}")
    return {"path": str(path), "format": args.format}
