"""sensitivity verify: whether an export is whole and answers as measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sensitivity.errors import UserError

ABOUT = "load an export in a fresh process, and compare its answers with the measured ones"
EXAMPLE = "sensitivity verify out/first"


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", type=Path, metavar="DIR", help="a folder that `sensitivity export` wrote")
    p.add_argument("--device", default="cpu", help="where to run, such as cuda (default: cpu)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from sensitivity.export.verify import verify

    found = verify(args.folder, args.device)
    if found["verdict"] in ("damaged", "different"):
        raise UserError(f"{args.folder}: {found['words']}")
    if not args.json:
        print(f"{args.folder}: {found['words']}")
    return found
