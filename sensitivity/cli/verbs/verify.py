"""sensitivity verify: checks that an export is undamaged and answers as measured."""

from __future__ import annotations

import argparse

from sensitivity.cli.arguments import path_values, values
from sensitivity.spec.errors import Failed

ABOUT = "load an export in a fresh process, and compare its answers with the measured ones"
EXAMPLE = "sensitivity verify out/first"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    p.add_argument("folder", type=path_values.path, metavar="DIR", help="a folder that `sensitivity export` wrote")
    p.add_argument("--device", type=values.name, default="cpu", help="where to run, such as cuda (default: cpu)")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Verify the export; a difference raises Failed."""
    from sensitivity.formats.verification import verify
    from sensitivity.models.loading import device_of

    device_of(args.device)
    outcome = verify(args.folder, args.device)
    if outcome["verdict"] in ("damaged", "different"):
        raise Failed(f"{args.folder}: {outcome['words']}")
    if not args.json:
        print(f"{args.folder}: {outcome['words']}")
    return outcome
