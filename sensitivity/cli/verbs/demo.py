"""sensitivity demo: runs the main verbs one after the other on the embedded model."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from sensitivity.cli.arguments import flags as words
from sensitivity.cli.arguments import values
from sensitivity.cli.arguments.parsing import parser_of, run_verb
from sensitivity.cli.verbs import inspect, rank, recommend, report, sweep

ABOUT = "sweep, rank, recommend and report on the embedded model, in about a minute"
EXAMPLE = "sensitivity demo"
MODEL = "embedded:scenes-llava"
STEPS = {"inspect": inspect, "sweep": sweep, "rank": rank, "recommend": recommend, "report": report}


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    words.budget(p)
    p.add_argument(
        "--out",
        type=values.folder,
        default=Path("runs/demo"),
        help="folder for the study, its plan and its report (default: runs/demo)",
    )
    words.samples(p, n=500)  # about a minute on two quiet cores: reports/busy.md


def run(args: argparse.Namespace) -> dict[str, object]:
    """Run the verbs one after the other, as a person would type them."""
    quoted = shlex.quote(str(args.out))
    lines = (
        f"inspect {MODEL} --by part --method uniform",
        f"sweep {MODEL} --task vqa --bits 2,3,4,8 --by part --method uniform --n {args.n} --seed {args.seed}"
        # plans that cannot matter see a few of the examples
        f" --until 'error<1%' --out {quoted}",
        f"rank {quoted}",
        f"recommend {quoted} --bpw {args.bpw!r}",
        f"report {quoted}",
    )
    return {line.split()[0]: _typed(line, args) for line in lines}


def _typed(line: str, args: argparse.Namespace) -> dict[str, object]:
    if not args.json:
        print(f"\n$ sensitivity {line}")
    flags = [flag for flag, on in (("--json", args.json), ("--debug", args.debug)) if on]
    words = [*shlex.split(line), *flags, *(["--threads", str(args.threads)] if args.threads else [])]
    one = parser_of(STEPS).parse_args(words, argparse.Namespace(typed=words))
    return run_verb(STEPS[one.verb], one)
