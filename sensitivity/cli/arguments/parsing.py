"""Parses the command line: no abbreviated flags, no flag twice, and each mistake as one sentence."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from sensitivity.cli.arguments import values
from sensitivity.cli.output.ticker import working
from sensitivity.spec.errors import UserError
from sensitivity.spec.version import __version__


def parser_of(verbs: Mapping[str, ModuleType], words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """A parser of these verbs, with the flags that all of them take.

    With what was typed, only the verb that it names is there, if it names one: the flags of all take a while to list.
    """
    named = {name: verb for name, verb in verbs.items() if words and name == words[0]}
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error, and libraries' warnings")
    threaded = "compute threads of a process (default: an equal share of the cores)"
    common.add_argument("--threads", type=values.processes, metavar="N", help=threaded)
    top = Parser(
        prog="sensitivity",
        description="Which parts of a vision-language model can be quantized how far, at what cost to your task?",
        epilog="example: sensitivity demo",
    )
    top.add_argument("--version", action="version", version=f"sensitivity {__version__}")
    top.verb = next(iter(named), "")
    choices = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in (named or verbs).items():
        described = f"{verb.ABOUT[0].upper()}{verb.ABOUT[1:]}."
        verb_parser = choices.add_parser(
            name, parents=[common], help=verb.ABOUT, description=described, epilog=f"example: {verb.EXAMPLE}"
        )
        if named or words is None:
            verb.arguments(verb_parser)
    return top


def run_verb(verb: ModuleType, args: argparse.Namespace) -> dict[str, object]:
    """Run a verb and return its result; without a terminal, a line every few seconds shows that it is running."""
    with working(args.verb, quiet=args.json):
        facts: dict[str, object] = verb.run(args)
    return facts


class Parser(argparse.ArgumentParser):
    """A parser that refuses abbreviated and repeated flags, and raises UserError for every mistake."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self.verb = ""  # that was typed: argparse reports words that no verb takes as errors of the whole line
        for name in (None, "store"):  # the action of add_argument without `action`, and of "store"
            self.register("action", name, Once)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message in our words: the flag, what it takes, what it got."""
        ours = re.sub(r"^argument (\S+): ", r"\1 ", message).replace("expected one argument", "needs a value")
        ours = re.sub(r"invalid choice: (.*) \(choose from (.*)\)$", r"is one of \2, not \1", ours)
        if ours != message:
            raise UserError(ours)
        ours = ours.replace("the following arguments are required", "still needed").replace("arguments", "words")
        verb = f" {self.verb}" if self.verb else ""
        raise UserError(f"{ours}; `{self.prog}{verb} --help` shows what there is")


class Once(argparse.Action):
    """Stores a value; the same flag a second time is an error, since it would silently replace the first value."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        known = namespace.__dict__.setdefault("given", set())
        if option_string and self.dest in known:
            raise argparse.ArgumentError(self, "is there twice; give it once")
        known.add(self.dest)
        setattr(namespace, self.dest, values)
