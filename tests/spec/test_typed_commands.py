"""Commands in messages can be typed as they are printed, also where a path has spaces."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import sensitivity
from sensitivity.analysis.recommending.request import PlanRequest
from sensitivity.cli.arguments.parsing import parser_of
from sensitivity.cli.arguments.scheme_flags import loadable_schemes, schemes
from sensitivity.cli.main import VERBS
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.spec.errors import UserError, shell_word
from sensitivity.spec.runtimes.table import RUNTIMES, sweep_flags
from sensitivity.study.study import Study

SOURCES = sorted(Path(sensitivity.__file__).parent.rglob("*.py"))
COMMAND = re.compile(rf"(?<!from )\bsensitivity ({'|'.join(VERBS)})\b")
PATHS = ("path", "out", "folder", "file", "model", "source", "atlas")  # last names of what may hold a path


def bare_paths(tree: ast.Module) -> Iterator[str]:
    """The paths that stand in a printed command as they are."""
    for text in ast.walk(tree):
        if isinstance(text, ast.JoinedStr):
            words = ""
            for part in text.values:
                if isinstance(part, ast.Constant):
                    words += str(part.value)
                elif isinstance(part, ast.FormattedValue) and COMMAND.search(words):
                    name = ast.unparse(part.value)
                    if name.rpartition(".")[2] in PATHS:
                        yield f"line {part.lineno}: {name}"


SUGGESTED = re.compile(rf"(?:^|`)sensitivity ((?:{'|'.join(VERBS)}) [^`]+)")  # a verb alone is only named
FLAGS = ("typed",)  # what holds flags and their values; whatever else is filled in is one word


def suggested(tree: ast.Module) -> Iterator[str]:
    """The commands that messages suggest, with the word 1 for what is filled in."""
    inside = {id(part) for text in ast.walk(tree) if isinstance(text, ast.JoinedStr) for part in text.values}
    for text in ast.walk(tree):
        words = ""
        if isinstance(text, ast.JoinedStr):
            words = "".join(
                str(part.value) if isinstance(part, ast.Constant) else _filled(part) for part in text.values
            )
        elif isinstance(text, ast.Constant) and isinstance(text.value, str) and id(text) not in inside:
            words = text.value
        yield from SUGGESTED.findall(words)


def _filled(part: ast.expr) -> str:
    assert isinstance(part, ast.FormattedValue)
    return "" if ast.unparse(part.value) in FLAGS else "1"


def test_suggested_commands_are_accepted_by_the_parser() -> None:
    found = [(file.name, words) for file in SOURCES for words in suggested(ast.parse(file.read_text("utf-8")))]
    assert len(found) > 30
    refused = {}
    for name, words in found:
        try:
            parser_of(VERBS, shlex.split(words)).parse_args(shlex.split(words))
        except UserError as error:
            refused[f"{name}: {words}"] = str(error)
    assert refused == {}


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_sweep_with_the_flags_of_a_runtime_has_something_to_measure(name: str) -> None:
    words = ["sweep", "embedded:scenes-llava", *sweep_flags(name).split(), "--out", "new"]
    args = parser_of(VERBS, words).parse_args(words)
    parts = inspect(load("embedded:scenes-llava", config_only=True), by=args.by)
    assert loadable_schemes(args, parts, schemes(args), None)


@pytest.mark.parametrize(
    "request_",
    [
        PlanRequest((4.0,), {"vqa": 1.0}),
        PlanRequest(
            (4.0,), {"own task": 2.0, "vqa": 0.5}, {"vqa": 0.95}, {"*.ff": (4, 16)}, (("vision", "language"),),
            "openvino", limits={"ms_per_token": 1.5},
        ),
    ],
    ids=["a task", "all"],
)  # fmt: skip
def test_a_request_is_typed_as_it_was_made(request_: PlanRequest) -> None:
    args = parser_of(VERBS).parse_args(["recommend", "study", *shlex.split(request_.typed)])
    weights = {args.task: 1.0} if args.task else dict(args.weight)
    assert (weights, dict(args.floor), dict(args.allow)) == (request_.weights, request_.floors, request_.allow)
    assert (tuple(map(tuple, args.tie)), args.runtime) == (request_.tie, request_.runtime)
    assert args.ms_per_token == request_.limits.get("ms_per_token")


def test_paths_in_commands_are_words_of_the_shell() -> None:
    found = {file.name: list(bare_paths(ast.parse(file.read_text(encoding="utf-8")))) for file in SOURCES}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_bare_path_is_found() -> None:
    assert list(bare_paths(ast.parse("f'next: sensitivity verify {args.out} --json'"))) == ["line 1: args.out"]
    assert not list(bare_paths(ast.parse("f'no study at {path}; sensitivity sweep --out {shell_word(path)}'")))


def test_a_command_with_spaces_in_its_path_is_typed_as_printed(tmp_path: Path) -> None:
    folder = tmp_path / "my runs" / "it's one"
    with pytest.raises(UserError) as error:
        Study(folder)
    command = re.search(r"`(.*?)`", str(error.value))
    assert command is not None
    assert shlex.split(command[1]) == ["sensitivity", "sweep", "MODEL", "--out", str(folder)]
    assert shell_word("runs/first") == "runs/first"
