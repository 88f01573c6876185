"""Run a published study again: `sensitivity sweep` with the study's plans, then our scores beside the published ones.

    python -m experiments.published --list
    python -m experiments.published blip2_gptq_coco --smoke         # a small random model, invented data
    python -m experiments.published blip2_gptq_coco --data COCO --dry-run
    python -m experiments.published blip2_gptq_coco --data COCO     # writes runs/blip2_gptq_coco

Everything else that `sensitivity sweep` accepts may be added, such as --device cuda or --until 2h.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from experiments.published.declaration import PublishedStudy, plan_of
from experiments.published.page import page
from experiments.published.table import STUDIES
from sensitivity.analysis.reporting.page import report
from sensitivity.cli import main as cli
from sensitivity.cli.arguments.parsing import parser_of
from sensitivity.cli.verbs import sweep
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.study import Study
from sensitivity.tasks.table import task

ROOT = Path(__file__).parents[2]
# flags of `sensitivity sweep` that the study decides; a worker process would not know the study's plans either
FIXED = ("--task", "--method", "--bits", "--by", "--search", "--trials", "--runtime", "--workers", "--executor")
SMOKE_N, SMOKE_CALIBRATION, SMOKE_PLANS = 6, 4, 3


def main(argv: Sequence[str] | None = None) -> None:
    args, more = arguments().parse_known_args(argv)
    if args.list:
        print("\n".join(f"{name:<22}{study.title}" for name, study in STUDIES.items()))
        return
    try:
        study = named(args.name)
        with prepared(study, args):
            run(study, args, sweep_arguments(study, args, more))
    except UserError as error:
        sys.exit(f"error: {error}")


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m experiments.published",
        description="Run a published study again and compare our scores with the published ones.",
        epilog="Everything else is handed to `sensitivity sweep`, such as --n, --seed, --device, --dry-run and --json.",
        allow_abbrev=False,  # or --me would be taken from --memory-gb, which is the sweep's
    )
    p.add_argument("name", nargs="?", metavar="NAME", help="which study; --list shows them")
    p.add_argument("--list", action="store_true", help="list all studies and stop")
    p.add_argument("--model", help="a folder or hub name (default: the study's own)")
    p.add_argument("--data", metavar="FOLDER", help="the data set, in its official layout")
    p.add_argument("--out", type=Path, help="where study and report go (default: runs/NAME)")
    p.add_argument(
        "--plans", type=int, metavar="N", help="run at most N plans, the published ones first (default: all)"
    )
    p.add_argument(
        "--smoke", nargs="?", const="", metavar="FOLDER", help="use a small random model and data, created in FOLDER"
    )
    return p


def named(name: str | None) -> PublishedStudy:
    if name is None:
        raise UserError("name a study, such as blip2_gptq_coco; --list shows all of them")
    if name not in STUDIES:
        close = get_close_matches(name, STUDIES, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"unknown study '{name}'; choose from {', '.join(STUDIES)}{hint}")
    return STUDIES[name]


@contextmanager
def prepared(study: PublishedStudy, args: argparse.Namespace) -> Iterator[None]:
    """Fill in model, data and output folder; in a smoke run create a small model and data, which are used again."""
    args.model = args.model or study.model
    if args.smoke is None:
        if args.data is None:
            names = " and ".join(one.partition(":")[0] for one in study.tasks)
            raise UserError(f"name the folder of {names} with --data FOLDER, or type --smoke")
        args.out = args.out or ROOT / "runs" / args.name
        yield
        return
    from experiments.small import datasets, models

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.smoke or temporary)
        model, data = folder / "models" / study.small, folder / "data" / study.tasks[0].partition(":")[0]
        if not model.exists():
            models.save(study.small, model)
        for one in study.tasks:
            name, _, where = one.format(data=data).partition(":")
            if not Path(where).exists():
                datasets.WRITE[name](Path(where))
        args.model, args.data = str(model), str(data)
        args.plans, args.out = args.plans or SMOKE_PLANS, args.out or folder / "runs" / args.name
        yield


def sweep_arguments(study: PublishedStudy, args: argparse.Namespace, more: Sequence[str]) -> argparse.Namespace:
    """The study as a command of `sensitivity sweep`, followed by what the user typed beyond it."""
    if fixed := [word for word in more if word.partition("=")[0] in FIXED]:
        raise UserError(f"{fixed[0]} is decided by the study; leave it out, or use `sensitivity sweep` itself")
    typed = ["sweep", args.model, "--method", study.method, "--bits", ",".join(map(str, study.widths))]
    typed += ["--by", study.by, "--out", str(args.out), "--workers", "1"]
    given = {word.partition("=")[0] for word in more}  # no option may be given twice
    for option, value in (("--n", study.n), ("--dtype", study.dtype)):
        if value and option not in given:
            typed += [option, str(value)]
    found = parser_of(cli.VERBS).parse_args([*typed, *more], argparse.Namespace(argv=[*typed, *more]))
    found.task = tuple(one.format(data=args.data) for one in study.tasks)  # a folder's name may hold a comma
    if args.smoke is not None:
        found.n, found.calibration_n = min(found.n, SMOKE_N), SMOKE_CALIBRATION
    return found


def run(study: PublishedStudy, args: argparse.Namespace, how: argparse.Namespace) -> None:
    scheme_of: dict[int, Scheme] = {}

    def plans(parts: ComponentMap, schemes: Sequence[Scheme]) -> list[Plan]:
        scheme_of.update(zip(study.widths, schemes, strict=True))  # with the calibration data, if any, written in
        return to_run(study, parts, scheme_of, args.plans)

    how.plans = plans
    with cli.quiet(how):
        facts = sweep.run(how)
    if how.dry_run:
        if how.json:
            print(json.dumps(facts, indent=2))
        return
    measured = Study(args.out)
    tasks = [task(name, n=how.n, seed=how.seed, whole=how.whole_answers) for name in how.task]
    text = "\n".join(page(study, measured, tasks, scheme_of, command(study, args, how), args.smoke is not None)) + "\n"
    written = [args.out / "published.md"]
    overwrite(written[0], text)
    if args.smoke is None:
        written.append(report(measured, args.out / "report"))
    print(text, end="")
    print(f"wrote {' and '.join(map(str, written))}", file=sys.stderr)


def command(study: PublishedStudy, args: argparse.Namespace, how: argparse.Namespace) -> str:
    """The command that measures the same again."""
    start = f"python -m experiments.published {args.name}"
    if args.smoke is not None:
        return f"{start} --smoke"
    used = {"model": args.model, "data": args.data, "n": how.n, "seed": how.seed}
    usual = {"device": "cpu", "dtype": study.dtype, "calibration_n": 128}
    used |= {name: getattr(how, name) for name, value in usual.items() if getattr(how, name) != value}
    used |= {"plans": args.plans} if args.plans else {}
    return " ".join([start, *(f"--{name.replace('_', '-')} {value}" for name, value in used.items())])


def to_run(study: PublishedStudy, parts: ComponentMap, scheme_of: dict[int, Scheme], most: int | None) -> list[Plan]:
    """At most `most` plans beside full precision: first those with a published score, then others, evenly spaced."""
    plans = study.plans(parts, scheme_of)
    published = len({plan_of(parts, score.plan, scheme_of) for score in study.scores if score.plan})
    if most is None or len(plans) <= most + 1:
        return plans
    first, others = plans[: min(published, most) + 1], plans[published + 1 :]
    chosen = np.linspace(0, len(others) - 1, most + 1 - len(first)).round().astype(int)
    return [*first, *(others[i] for i in chosen)]


if __name__ == "__main__":
    main()
