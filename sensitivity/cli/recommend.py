"""sensitivity recommend: the best plan for a budget, verified."""

from __future__ import annotations

import argparse
from typing import Any

from sensitivity import terminal
from sensitivity.cli import words

ABOUT = "choose the best plan for a budget, and verify it by running it"
EXAMPLE = "sensitivity recommend runs/first --bpw 4.0"


def arguments(p: argparse.ArgumentParser) -> None:
    words.study(p)
    words.budget(p)
    words.task(p)
    p.add_argument(
        "--floor",
        type=words.floor,
        action="append",
        default=[],
        metavar="TASK=SHARE",
        help="keep a task at this share of full precision, such as ground=0.95",
    )
    p.add_argument(
        "--runtime", metavar="NAME", help="only plans that it can load, such as compressed-tensors"
    )
    p.add_argument("--gb", type=float, metavar="X", help="the budget in GB (10^9 bytes), instead of --bpw")
    p.add_argument("--no-run", action="store_true", help="predict only; the model is not loaded")
    p.add_argument("--model", help="where the model is, if not where the sweep found it")
    words.device(p)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from sensitivity import verbs
    from sensitivity.trials import Study

    study = Study(args.study)
    model = args.model or study.meta.get("model")
    vlm = None
    if not args.no_run and "fingerprint" in study.meta:
        vlm = verbs.load(str(model), device=args.device, dtype=args.dtype or study.meta["dtype"])
    bpw = args.bpw if args.gb is None else args.gb * 8e9 / study.parts.numel
    chosen, steps = verbs.recommending(study, bpw, vlm, args.task, dict(args.floor), runtime=args.runtime)
    if vlm is not None:
        terminal.walk(steps, "verifying")
    found = chosen()
    path = verbs.remember(study, found)
    if not args.json:
        terminal.recommendation(found)
        print(f"plan: {path}")
    return {**found.to_json(), "path": str(path)}
