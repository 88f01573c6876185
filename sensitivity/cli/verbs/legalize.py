"""sensitivity legalize: finds the best plan that a runtime can load."""

from __future__ import annotations

import argparse

from sensitivity.cli.arguments import flags, path_values, values
from sensitivity.spec.errors import UserError, shell_word

ABOUT = "find the best plan that a runtime can load, and what that costs"
EXAMPLE = "sensitivity legalize runs/first --bpw 4.0 --runtime vllm --out out/plan.json"


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_source(p)
    flags.add_runtime(p, "runtime that must load the plan: a format, vllm or onnx-int8", required=True)
    p.add_argument("--bpw", type=values.bpw, metavar="X", help="the budget (default: the size of the plan)")
    flags.add_task(p)
    p.add_argument(
        "--out",
        type=path_values.file,
        metavar="plan.json",
        help="where to write the plan (default: it is only printed)",
    )
    p.add_argument("--force", action="store_true", help="replace a plan that is there")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Find the best legal plan, and write it if --out is given."""
    from sensitivity.api import exporting
    from sensitivity.spec.runtimes.table import files_of

    if args.out is None:
        flags.without_effect(args, ["--force"], "without --out")
    if args.out is not None:
        if args.out.suffix != ".json":
            raise UserError(f"--out takes a file, such as {args.out / 'plan.json'}")
        exporting.may_be_written(args.out, "plan", args.force, [args.source])  # before the slow search
    study, legal = exporting.legalize_from(args.source, args.runtime, args.bpw, args.task)
    facts = legal.to_json()
    if args.out is not None:
        exporting.export(study, legal.plan, args.out, force=args.force, facts={"legalized": facts}, keep=[args.source])
    if not args.json:
        for violation in legal.violations:
            print(f"{legal.runtime} cannot load this plan: {violation}")
        before, after = (f"{size.bpw:.3f} bpw {size.counted}" for size in (legal.before, legal.after))
        if legal.too_large and not legal.violations:
            print(f"too large for the budget: {legal.asked.describe()}, {before}")
        elif legal.plan != legal.asked and not legal.violations:
            print(f"can be loaded, but there is a better plan of its size: {legal.asked.describe()}, {legal.wider}")
        print(f"{'can be loaded as it is' if legal.plan == legal.asked else 'best plan'}: {legal.plan.describe()}")
        print(f"  {after}" + (f", {legal.after.bytes:,} bytes" if legal.after.sized else ""))
        print(f"cost: {legal.words}")
        if args.out is not None:
            format = files_of(args.runtime) or args.runtime
            print(f"wrote {args.out}; next: sensitivity export {shell_word(args.out)} --format {format} --out DIR")
    return facts
