"""sensitivity demo: runs the main verbs one after the other on the embedded model."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from sensitivity.cli.arguments import flags, path_values
from sensitivity.cli.arguments.parsing import parser_of, run_verb
from sensitivity.cli.verbs import export, inspect, plan, rank, recommend, report, sweep, verify
from sensitivity.cli.verbs.timing import bench, profile
from sensitivity.spec.errors import shell_word
from sensitivity.spec.runtimes.layer_times import check_timed

ABOUT = "plan, sweep, rank, recommend and report on the embedded model, in a minute and a half"
EXAMPLE = "sensitivity demo"
MODEL = "embedded:scenes-llava"
FEWER_EXAMPLES = 5  # `plan` runs on this many times fewer examples than `sweep`, so that it takes seconds
STEPS = {
    "inspect": inspect, "plan": plan, "profile": profile, "sweep": sweep, "rank": rank, "recommend": recommend,
    "export": export, "verify": verify, "bench": bench, "report": report,
}  # fmt: skip


def arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    flags.add_budget(p)
    p.add_argument(
        "--out",
        type=path_values.out_folder,
        default=Path("runs/demo"),
        help="folder for the study, its plan and its report (default: runs/demo); further folders, such as that of"
        " `plan`, stand beside it",
    )
    flags.add_runtime(
        p, "also run the plan in this runtime (openvino): export it, compare its answers with those measured, time it"
    )
    flags.add_samples(p, n=500)  # a minute and a half on two quiet cores


def run(args: argparse.Namespace) -> dict[str, object]:
    """Run the verbs one after the other, as a person would type them."""
    lines = _in_runtime(args.runtime, args) if args.runtime else _without_runtime(args)
    return {line.split()[0]: _run_line(line, args) for line in lines}


def _without_runtime(args: argparse.Namespace) -> list[str]:
    """The command lines of the verbs that need no runtime."""
    out, planned = shell_word(args.out), shell_word(f"{args.out}-plan")
    return [
        f"inspect {MODEL} --by part --method uniform",
        f"plan {MODEL} --task vqa --bits 2,3,4,8 --by part --method uniform --bpw {args.bpw!r} --calibration-n 32"
        f" --n {-(-args.n // FEWER_EXAMPLES)} --seed {args.seed} --out {planned}",
        f"sweep {MODEL} --task vqa --bits 2,3,4,8 --by part --method uniform --n {args.n} --seed {args.seed}"
        # plans that cannot reach the frontier see only some of the examples
        f" --until 'error<1%' --out {out}",
        f"rank {out}",
        f"recommend {out} --bpw {args.bpw!r}",
        f"report {out}",
    ]


def _in_runtime(runtime: str, args: argparse.Namespace) -> list[str]:
    """The same lines without `plan`, for plans that the runtime can load; and lines that export one and time it."""
    check_timed(runtime)
    from sensitivity.formats.timing.profile import check_runs_here

    check_runs_here(MODEL, runtime)
    out, exported = shell_word(args.out), shell_word(f"{args.out}-{runtime}")
    inspected, _, swept, ranked, recommended, reported = _without_runtime(args)
    return [
        inspected.replace("uniform", "rtn"),
        f"profile {MODEL} --runtime {runtime} --bits 2,3,4,8",
        swept.replace("--method uniform", f"--method rtn --runtime {runtime}"),
        ranked,
        f"{recommended} --runtime {runtime}",
        f"export {out}/plan.json --format {runtime} --out {exported} --force",
        f"verify {exported}",
        f"bench {exported}",
        reported,
    ]


def _run_line(line: str, args: argparse.Namespace) -> dict[str, object]:
    """Print a command line, and run it with the flags that all verbs take."""
    if not args.json:
        print(f"\n$ sensitivity {line}")
    passed_on = [flag for flag, on in (("--json", args.json), ("--debug", args.debug)) if on]
    words = [*shlex.split(line), *passed_on, *(["--threads", str(args.threads)] if args.threads else [])]
    parsed = parser_of(STEPS, words).parse_args(words, argparse.Namespace(argv=words))
    return run_verb(STEPS[parsed.verb], parsed)
