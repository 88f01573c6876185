"""The budgets that --bpw or --gb ask for, in bits per weight."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sensitivity.cli.arguments import flags
from sensitivity.spec.errors import UserError

if TYPE_CHECKING:
    from sensitivity.spec.components import ComponentMap


def check_budget_flags(args: argparse.Namespace) -> None:
    """Raise an error if both kinds of budgets are given."""
    if args.gb is not None:
        flags.without_effect(args, ["--bpw"], "beside --gb: budgets are either in bpw or in GB")


def budgets_in_bpw(args: argparse.Namespace, parts: ComponentMap) -> tuple[float, ...]:
    """The budgets in bits per weight; one in GB also pays for the headers of the files of --runtime, and is printed."""
    from sensitivity.spec.runtimes.headers import bpw_in_gb, header_bytes
    from sensitivity.spec.runtimes.table import files_of

    if args.gb is None:
        return tuple(args.bpw)
    if not parts.sized:
        raise UserError(
            "a budget in GB needs the sizes of the parts, which the imported table does not say: give --bpw, or "
            "import it with --numel"
        )
    headers = header_bytes(parts, files_of(args.runtime))
    budgets = tuple(bpw_in_gb(parts, gb, headers) for gb in args.gb)
    if not args.json:  # the answers name budgets in bits per weight
        each = (f"{gb:g} GB is {bpw:.4g} bits per weight" for gb, bpw in zip(args.gb, budgets, strict=True))
        print(f"--gb: {', '.join(each)}")
    return budgets
