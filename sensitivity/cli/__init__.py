"""One verb each for inspect, sweep, rank, recommend, export, report; demo runs them all. The only reader of argv."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from sensitivity import threads
from sensitivity.cli import demo, export, import_, inspect, legalize, rank, recommend, report, sweep, verify, words
from sensitivity.errors import Notice, UserError
from sensitivity.ticker import working

# A verb is a module with ABOUT, EXAMPLE, arguments(parser) and run(args) -> what --json prints. torch, pandas and the
# like are imported inside run(): `sensitivity --help` is to answer at once.
VERBS: dict[str, ModuleType] = {
    "inspect": inspect,
    "sweep": sweep,
    "rank": rank,
    "recommend": recommend,
    "legalize": legalize,
    "export": export,
    "verify": verify,
    "report": report,
    "import": import_,
    "demo": demo,
}
STOPPED = 130  # by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 0, or 1 after one clear sentence on standard error."""
    typed = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(typed, argparse.Namespace(typed=typed))  # workers start the same command again
    if args.threads:
        threads.limit(args.threads)
    if not sys.stdout.isatty() and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # whoever follows a log sees each line when it is written
    try:
        with quiet(args):
            facts = done(args)
        if args.json:
            print(json.dumps(facts, indent=2, default=str))
        return 0
    except KeyboardInterrupt:
        return fail(args, "stopped; what was finished is kept, and the same command continues", STOPPED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError, MemoryError) as error:
        if args.debug:
            raise
        return fail(args, str(error) or type(error).__name__, 1)
    except Exception as error:
        if args.debug:
            raise
        return fail(args, f"unexpected {type(error).__name__}: {error} (a defect; --debug shows where)", 1)


def done(args: argparse.Namespace) -> dict[str, Any]:
    """What a verb finds; where no terminal shows that it is at work, a line says so every few seconds."""
    with working(args.verb, quiet=args.json):
        facts: dict[str, Any] = VERBS[args.verb].run(args)
    return facts


def fail(args: argparse.Namespace, message: str, status: int) -> int:
    print(message if status == STOPPED else f"error: {message}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": message}))
    return status


@contextlib.contextmanager
def quiet(args: argparse.Namespace) -> Iterator[None]:
    """Keep libraries' own progress bars and warnings off the terminal, unless --debug asks for them."""
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if args.debug else "error")
    with warnings.catch_warnings():
        if not args.debug:
            warnings.simplefilter("ignore")
        warnings.simplefilter("default", Notice)
        shown = warnings.showwarning
        warnings.showwarning = lambda message, category, *where, **how: (
            print(f"note: {message}", file=sys.stderr)
            if issubclass(category, Notice)
            else shown(message, category, *where, **how)
        )
        yield


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error, and libraries' warnings")
    threaded = "threads that compute in a process (default: its share of the cores)"
    common.add_argument("--threads", type=words.count, metavar="N", help=threaded)
    top = argparse.ArgumentParser(
        prog="sensitivity",
        description="Which parts of a vision-language model can be quantised how far, at what cost to your task?",
        epilog="example: sensitivity demo",
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        described = f"{verb.ABOUT[0].upper()}{verb.ABOUT[1:]}."
        one = verbs.add_parser(
            name, parents=[common], help=verb.ABOUT, description=described, epilog=f"example: {verb.EXAMPLE}"
        )
        verb.arguments(one)
    return top
