"""One verb each for inspect, sweep, rank, recommend, export, report; demo runs them all. The only reader of argv."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn

from sensitivity import standard_output, threads
from sensitivity.cli import demo, export, import_, inspect, legalize, rank, recommend, report, sweep, values, verify
from sensitivity.errors import Failed, Notice, UserError, plain, said
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
FAILED, REFUSED, STOPPED = 1, 2, 130  # the last by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 0, or after a sentence on standard error 2 (what was asked for cannot be) or 1 (it failed)."""
    typed = list(sys.argv[1:] if argv is None else argv)
    asked = argparse.Namespace(typed=typed, json="--json" in typed, debug="--debug" in typed)
    try:
        args = parser().parse_args(typed, asked)  # `typed` as well: workers start the same command again
        if args.threads:
            threads.limit(args.threads)
        if not sys.stdout.isatty() and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # whoever follows a log sees each line when it is written
        with quiet(args), standard_output.reserved() if args.json else contextlib.nullcontext():
            facts = done(args)
        if args.json:
            print(json.dumps(finite(facts), indent=2, default=str))
        return 0
    except KeyboardInterrupt:
        return fail(asked, "stopped; what was finished is kept, and the same command continues", STOPPED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except UserError as error:
        return fail(asked, str(error), FAILED if isinstance(error, Failed) else REFUSED)
    except OSError as error:
        return fail(asked, said(error), FAILED)
    except MemoryError as error:
        return fail(asked, str(error) or "out of memory", FAILED)
    except Exception as error:
        return fail(asked, f"unexpected {type(error).__name__}: {error} (a defect; --debug shows where)", FAILED)


def done(args: argparse.Namespace) -> dict[str, Any]:
    """What a verb finds; where no terminal shows that it is at work, a line says so every few seconds."""
    with working(args.verb, quiet=args.json):
        facts: dict[str, Any] = VERBS[args.verb].run(args)
    return facts


def fail(args: argparse.Namespace, message: str, status: int) -> int:
    if args.debug and status != STOPPED:
        traceback.print_exc()
    message = plain(message)
    print(message if status == STOPPED else f"error: {message}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": message}))
    return status


def finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they are null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Parser(argparse.ArgumentParser):
    """Flags as they are spelled, none of them given twice, and what is wrong said like everything else that is."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how, allow_abbrev=False)
        for name in (None, "store"):
            self.register("action", name, Once)

    def error(self, message: str) -> NoReturn:
        about = re.sub(r"^argument (\S+): ", r"\1 ", message).replace("expected one argument", "needs a value")
        about = re.sub(r"invalid choice: (.*) \(choose from (.*)\)$", r"is one of \2, not \1", about)
        if about != message:
            raise UserError(about)
        about = about.replace("the following arguments are required", "still needed").replace("arguments", "words")
        raise UserError(f"{about}; `{self.prog} --help` shows what there is")


class Once(argparse.Action):
    """Keeps a value; a second one is a mistake, as it would replace the first without a word."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        known = namespace.__dict__.setdefault("given", set())
        if option_string and self.dest in known:
            raise argparse.ArgumentError(self, "is there twice; give it once")
        known.add(self.dest)
        setattr(namespace, self.dest, values)


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
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error, and libraries' warnings")
    threaded = "threads that compute in a process (default: its share of the cores)"
    common.add_argument("--threads", type=values.processes, metavar="N", help=threaded)
    top = Parser(
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
