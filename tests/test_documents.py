"""What the documents say exists: links, files, tests and commands; and the README stays one page."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import readme

from sensitivity.cli.arguments.parsing import parser_of
from sensitivity.cli.main import VERBS

PAGES = [readme.README, *(readme.ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]
PAGES += sorted((readme.ROOT / "docs").glob("*.md"))
EACH = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = ("sensitivity/", "reports/", "experiments/", "notebooks/", "docs/", "tests/")


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def code(page: Path) -> list[str]:
    return CODE.findall(prose(page))


def commands(page: Path) -> Iterator[str]:
    """The command lines in blocks of shell, and those that stand in a sentence with at least one option."""
    for fence in FENCE.finditer(page.read_text(encoding="utf-8")):
        if fence["language"] == "sh":
            yield from (line for line in fence["body"].splitlines() if line.startswith("sensitivity "))
    yield from (one for one in code(page) if re.match(r"sensitivity [a-z]+ .*--", one))


@cache
def options() -> set[str]:
    """Every option of every verb."""
    choices = next(action.choices for action in parser_of(VERBS)._actions if isinstance(action.choices, dict))
    return {name for verb in choices.values() for action in verb._actions for name in action.option_strings}


def test_percent_is_written_in_one_style() -> None:
    """As `95 %`, in what is printed too; only what a user types, such as `error<0.5%`, has no space."""
    for file in (*(readme.ROOT / "sensitivity").rglob("*.py"), *(readme.ROOT / "notebooks").glob("*.ipynb")):
        assert not re.search(r"[0-9]%\}|\}%(?!\})", file.read_text(encoding="utf-8")), file


@EACH
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            there = page.parent / file if file else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@EACH
def test_paths_exist(page: Path) -> None:
    for one in code(page):
        if one.startswith(FOLDERS) and " " not in one:
            assert (readme.ROOT / one).exists(), one


@EACH
def test_tests_exist(page: Path) -> None:
    named = {one for one in code(page) if re.fullmatch(r"test_\w+", one)}
    assert named <= defined(), sorted(named - defined())


@cache
def defined() -> set[str]:
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (readme.ROOT / "tests").rglob("test_*.py"))
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@EACH
def test_commands_are_accepted_by_the_parser(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        parser_of(VERBS, words).parse_args(words)  # an unknown option exits


@EACH
def test_grids_are_of_few_components(page: Path) -> None:
    """Every combination of widths of finer parts is refused for nearly every model."""
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        args = parser_of(VERBS, words).parse_args(words)
        if getattr(args, "verb", words[0]) == "sweep" and args.search == "grid":
            assert args.by == "part", line


@EACH
def test_options_exist(page: Path) -> None:
    others = {"--help", "--data", "--smoke", "--list"}  # all but the first are those of experiments
    for one in code(page):
        if one.startswith("--"):
            assert one.split()[0] in options() | others, one


RECORDS = [*sorted((readme.ROOT / "reports").glob("*.md")), readme.ROOT / "experiments" / "LOG.md"]


@pytest.mark.parametrize("page", RECORDS, ids=lambda page: page.name)
def test_programs_behind_the_reports_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"(?:experiments|sensitivity|tests)/[\w/-]+\.py\b", text)
    for module in re.findall(r"-m (experiments(?:\.\w+)+)", text):
        path = module.replace(".", "/")
        files.append(f"{path}/__main__.py" if (readme.ROOT / path).is_dir() else f"{path}.py")
    assert [file for file in files if not (readme.ROOT / file).exists()] == []
    assert files, "a report names the program that made it"


def test_there_is_something_to_check() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) > 20
    assert sum(one.startswith("test_") for page in PAGES for one in code(page)) > 40


def test_the_readme_is_one_page() -> None:
    assert len(readme.README.read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_navigation() -> None:
    def files(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for one in entry.values() if isinstance(entry, dict) else entry:  # type: ignore[attr-defined]
                yield from files(one)

    nav = tomllib.loads((readme.ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    assert sorted(files(nav)) == sorted(path.name for path in (readme.ROOT / "docs").glob("*.md"))


def test_the_picture_is_small() -> None:
    assert (readme.ROOT / "docs" / "report.png").stat().st_size < 300_000
