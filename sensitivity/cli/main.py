"""The entry point: runs one verb, and turns every error into one sentence and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

from sensitivity.cli.arguments.parsing import parser_of, run_verb
from sensitivity.cli.output import json_lines
from sensitivity.cli.plugins import load_plugins
from sensitivity.cli.processes import interrupts
from sensitivity.cli.processes.collector import look_seldom
from sensitivity.cli.verbs import (
    demo,
    explain,
    export,
    import_,
    inspect,
    legalize,
    methods,
    plan,
    rank,
    recommend,
    report,
    speculate,
    sweep,
    verify,
)
from sensitivity.cli.verbs.reading import atlas, compare, failures, table, watch
from sensitivity.cli.verbs.timing import bench, profile
from sensitivity.spec import standard_output, threads
from sensitivity.spec.errors import Failed, NoSpace, Notice, Partly, UserError, os_message, printable
from sensitivity.spec.files import finite

# A verb is a module with ABOUT, EXAMPLE, arguments(parser) and run(args), which returns what --json prints. Verbs
# import torch, pandas and other slow libraries inside run(), so that `sensitivity --help` answers at once.
VERBS: dict[str, ModuleType] = {
    "inspect": inspect,
    "methods": methods,
    "plan": plan,
    "sweep": sweep,
    "explain": explain,
    "speculate": speculate,
    "profile": profile,
    "rank": rank,
    "recommend": recommend,
    "legalize": legalize,
    "export": export,
    "verify": verify,
    "bench": bench,
    "report": report,
    "failures": failures,
    "table": table,
    "compare": compare,
    "atlas": atlas,
    "watch": watch,
    "import": import_,
    "demo": demo,
}
CONTINUED = {"plan", "sweep", "recommend", "demo"}  # verbs that measure plans, and store each as it is done
BEGUN = {"plan", "sweep"}  # those of them that make the study, as --out
AGAIN, CONTINUES = "the same command begins again", "the same command continues"
FAILED, REFUSED = 1, 2  # exit codes
STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143}  # as shells have them
# parts of an ImportError's message when there is no memory for a shared library
OUT_OF_MEMORY = ("failed to map segment", "annot allocate memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code is 0, 1 (it failed), 2 (the request is invalid), 130 (Ctrl-C) or 143 (SIGTERM).

    Every code but 0 comes with a sentence on standard error, unless the reader of our output is gone (a broken pipe).
    """
    if argv is None:
        look_seldom()
    words = list(sys.argv[1:] if argv is None else argv)
    # looked up before parsing, so that errors of parsing honor --json and --debug too
    asked = argparse.Namespace(argv=words, json="--json" in words, debug="--debug" in words)
    with json_lines.on_standard_error(asked.json), interrupts.heard() as heard:
        return _run(words, asked, heard)


def _run(words: Sequence[str], asked: argparse.Namespace, heard: interrupts.Interrupts) -> int:
    """Run one verb, and turn every error into an exit code."""
    try:
        args = parser_of(VERBS, words).parse_args(words, asked)  # keeps `argv`: workers run the same command
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # an encoding without a character ends no verb
        if args.threads:
            threads.limit(args.threads)
        if not sys.stdout.isatty() and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # a reader of a log sees each line at once
        with quiet(args), standard_output.held_back() if args.json else contextlib.nullcontext():
            load_plugins()
            facts = run_verb(VERBS[args.verb], args)
        if args.json:
            print(json.dumps(finite(facts), indent=2, default=str))
        return 0
    except KeyboardInterrupt:
        return _stopped(words, asked, heard)
    except BrokenPipeError:  # as with `| head`
        _print_no_more()
        return FAILED
    except Partly as error:
        return fail(asked, str(error), REFUSED, error.facts)
    except NoSpace as error:
        what = f"{CONTINUES}: what was finished is kept" if _goes_on(words, asked) else AGAIN
        return fail(asked, f"{error}, and {what}", FAILED)
    except UserError as error:
        return fail(asked, str(error), FAILED if isinstance(error, Failed) else REFUSED)
    except OSError as error:
        return fail(asked, os_message(error), FAILED)
    except MemoryError as error:
        return fail(asked, str(error) or "out of memory", FAILED)
    except Exception as error:
        if heard.signal:  # a library that was interrupted while it was imported raises errors of its own
            return _stopped(words, asked, heard)
        if isinstance(error, ImportError) and any(sign in str(error) for sign in OUT_OF_MEMORY):
            return fail(asked, f"out of memory while a library was loaded: {error}", FAILED)
        return fail(asked, f"unexpected {type(error).__name__}: {error} (a defect; --debug shows where)", FAILED)


def _stopped(words: Sequence[str], asked: argparse.Namespace, heard: interrupts.Interrupts) -> int:
    """Say that a signal stopped the verb, and what is left of its work."""
    kept = ""
    if _goes_on(words, asked):
        kept = f"; what was finished is kept, and {CONTINUES}"
    elif words[:1] and words[0] in BEGUN:
        kept = f" before any plan was run; {AGAIN}"
    return fail(asked, f"stopped{kept}", STOPPED[heard.signal or signal.SIGINT])


def _goes_on(words: Sequence[str], asked: argparse.Namespace) -> bool:
    """Whether the same command would go on from what it has stored."""
    from sensitivity.study.storage.paths import is_study

    if not words or words[0] not in CONTINUED:
        return False
    out = getattr(asked, "out", None)
    return words[0] not in BEGUN or (out is not None and is_study(out))


def fail(args: argparse.Namespace, message: str, status: int, result: Mapping[str, object] = {}) -> int:
    """Print an error as one sentence, or with --json as an object on both outputs; returns the exit code.

    On standard output, the object has the result of what could be done, too.
    """
    stopped = status in STOPPED.values()
    message, shown = printable(message), args.debug and not stopped
    if args.json:
        facts = {"error": message, "exit": status}
        print(json.dumps(facts | ({"traceback": traceback.format_exc()} if shown else {})), file=sys.stderr)
        try:
            print(json.dumps(finite({**result, **facts}), default=str), flush=True)
        except OSError:  # standard output is what failed, as on a full disk
            _print_no_more()
        return status
    if shown:
        traceback.print_exc()
    print(message if stopped else f"error: {message}", file=sys.stderr)
    return status


def _print_no_more() -> None:
    """Send standard output nowhere, so that Python's flush at exit does not fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def quiet(args: argparse.Namespace) -> Iterator[None]:
    """Hide the progress bars and warnings of libraries, unless --debug is given; our Notices are printed."""
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if args.debug else "error")
    with warnings.catch_warnings():
        if not args.debug:
            warnings.simplefilter("ignore")
        warnings.simplefilter("default", Notice)
        show_as_before = warnings.showwarning
        warnings.showwarning = lambda message, category, *where, **how: (
            print(f"note: {message}", file=sys.stderr)  # with --json, an object
            if issubclass(category, Notice)
            else show_as_before(message, category, *where, **how)
        )
        yield
