"""What the published experiments share: arguments, small models for smoke runs, the dry run, and the sweep.

An experiment is a short file that declares an Experiment and calls main(); it needs the weights and the data:

    python experiments/blip2_gptq_coco.py --data COCO [--model MODEL] [--dry-run]
    python experiments/blip2_gptq_coco.py --smoke     # a small random model, made-up data: shows that it runs
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from beside import CALIBRATION_N, page
from declared import Experiment, Figure, alone, mixed, plan_of

from sensitivity import terminal, verbs
from sensitivity.cli import words
from sensitivity.components import ComponentMap
from sensitivity.errors import UserError
from sensitivity.files import write_again
from sensitivity.models.blank import blank
from sensitivity.plan import Plan, Scheme
from sensitivity.preflight import foresee
from sensitivity.quantize import scheme
from sensitivity.tasks import task

__all__ = ["Experiment", "Figure", "alone", "main", "mixed"]

ROOT = Path(__file__).parent.parent
SMOKE_N, SMOKE_PLANS = 6, 3


def main(experiment: Experiment, file: str, argv: Sequence[str] | None = None) -> None:
    """`file` is the experiment's own, by whose name its study goes."""
    args = arguments(experiment).parse_args(argv, argparse.Namespace(name=Path(file).stem))
    try:
        with stage(experiment, args):
            run(experiment, args)
    except UserError as error:
        sys.exit(f"error: {error}")


def arguments(experiment: Experiment) -> argparse.ArgumentParser:
    names = " and ".join(one.partition(":")[0] for one in experiment.tasks)
    p = argparse.ArgumentParser(
        description=f"{experiment.title}: as published, beside our own figures.",
        epilog="Try --smoke first, then --dry-run with the real --model and --data.",
    )
    p.add_argument("--model", default=experiment.model, help=f"a folder or hub name (default: {experiment.model})")
    p.add_argument(
        "--data",
        metavar="FOLDER",
        help=f"the folder of {names}, in the official layout; if a file is missing, it is said what to download",
    )
    most = f"examples per task, drawn with the seed (default: {experiment.n:,}, or all there are)"
    p.add_argument("--n", type=int, default=experiment.n, help=most)
    p.add_argument("--seed", type=int, default=0, help="of the examples (default: 0)")
    words.device(p)
    p.add_argument("--out", type=Path, help="where study and report go (default: runs/ and the name of this file)")
    p.add_argument("--plans", type=int, metavar="N", help="at most N plans, the published first (default: all)")
    p.add_argument(
        "--calibration-n", type=int, default=CALIBRATION_N, metavar="N", help="examples to calibrate on (default: 128)"
    )
    p.add_argument("--dry-run", action="store_true", help="predict time, disk and memory; no weights are loaded")
    p.add_argument("--json", action="store_true", help="with --dry-run: print one JSON object")
    p.add_argument(
        "--smoke", nargs="?", const="", metavar="FOLDER", help="a small random model and data, made in FOLDER"
    )
    p.set_defaults(dtype=experiment.dtype)
    return p


@contextmanager
def stage(experiment: Experiment, args: argparse.Namespace) -> Iterator[None]:
    """The model and the data that are named; in a smoke run small ones, made in a folder that may be used again."""
    if args.smoke is None:
        if args.data is None:
            names = " and ".join(one.partition(":")[0] for one in experiment.tasks)
            raise UserError(f"type --data FOLDER, where {names} is, or --smoke")
        args.out = args.out or ROOT / "runs" / args.name
        yield
        return
    from small import datasets, models

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.smoke or temporary)
        model, data = folder / "models" / experiment.small, folder / "data"
        if not model.exists():
            models.save(experiment.small, model)
        for one in experiment.tasks:
            name, _, where = one.format(data=data / experiment.tasks[0].partition(":")[0]).partition(":")
            if not Path(where).exists():
                datasets.WRITE[name](Path(where))
        args.model, args.data = str(model), str(data / experiment.tasks[0].partition(":")[0])
        args.n, args.calibration_n, args.plans = min(args.n, SMOKE_N), 4, args.plans or SMOKE_PLANS
        args.out = args.out or folder / "runs" / args.name
        yield


def run(experiment: Experiment, args: argparse.Namespace) -> None:
    names = [one.format(data=args.data) for one in experiment.tasks]
    chosen = [task(name, n=args.n, seed=args.seed) for name in names]
    for one in chosen:
        for note in one.notes:
            print(f"{one.name}: {note}", file=sys.stderr)
    schemes = [scheme(experiment.method, width) for width in experiment.widths]
    if args.dry_run:
        vlm = blank(args.model)
        parts = verbs.inspect(vlm, by=experiment.by)
        plans = to_run(experiment, parts, schemes, args.plans)
        how = {"calibration": args.calibration_n, "device": args.device, "dtype": args.dtype}
        found = foresee(vlm, parts, plans, chosen, **how)
        print(json.dumps(found.to_json(), indent=2)) if args.json else terminal.forecast(found)
        return
    vlm = verbs.load(args.model, device=args.device, dtype=args.dtype)
    parts = verbs.inspect(vlm, by=experiment.by)
    schemes, statistics = verbs.calibrated(
        vlm, parts, schemes, names, n=args.calibration_n, seed=args.seed, against=chosen
    )
    scheme_of = dict(zip(experiment.widths, schemes, strict=True))
    plans = to_run(experiment, parts, schemes, args.plans)
    study, steps = verbs.sweeping(vlm, parts, plans, names, args.out, n=args.n, seed=args.seed, statistics=statistics)
    terminal.walk(steps, f"sweeping {args.model}", study)
    lines = page(experiment, study, chosen, scheme_of, vlm, args)
    written = [args.out / "published.md"]
    write_again(written[0], "\n".join(lines) + "\n")
    if args.smoke is None:
        written.append(verbs.report(study, args.out / "report"))
    print("\n".join(lines))
    print(f"wrote {' and '.join(map(str, written))}", file=sys.stderr)


def to_run(experiment: Experiment, parts: ComponentMap, schemes: Sequence[Scheme], most: int | None) -> list[Plan]:
    """At most so many plans beside full precision: those that were published, then evenly from the others."""
    scheme_of = dict(zip(experiment.widths, schemes, strict=True))
    plans = experiment.plans(parts, scheme_of)
    published = len({plan_of(parts, figure.plan, scheme_of) for figure in experiment.figures if figure.plan})
    if most is None or len(plans) <= most + 1:
        return plans
    first, others = plans[: min(published, most) + 1], plans[published + 1 :]
    chosen = np.linspace(0, len(others) - 1, most + 1 - len(first)).round().astype(int)
    return [*first, *(others[i] for i in chosen)]
