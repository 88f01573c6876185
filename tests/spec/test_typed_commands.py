"""Commands in messages can be typed as they are printed, also where a path has spaces."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import sensitivity
from sensitivity.cli.main import VERBS
from sensitivity.spec.errors import UserError, shell_word
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
    command = re.search(r"`(.*)`", str(error.value))
    assert command is not None
    assert shlex.split(command[1]) == ["sensitivity", "sweep", "MODEL", "--out", str(folder)]
    assert shell_word("runs/first") == "runs/first"
