"""Parts of the documents that are made from the code: `python tests/readme.py` writes them, a test compares them."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import sensitivity
from sensitivity.cli.arguments.parsing import parser_of
from sensitivity.cli.main import VERBS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ARCHITECTURE, COMMANDS = ROOT / "docs" / "architecture.md", ROOT / "docs" / "commands.md"
PYTHON, EXTENDING = ROOT / "docs" / "python.md", ROOT / "docs" / "extending.md"
GENERATED = (ARCHITECTURE, COMMANDS, PYTHON, EXTENDING)
BLOCK = re.compile(r"(<!-- (?P<name>[\w: .-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = "110"  # of help texts

# the public names in the order of the straight line; the examples in their docstrings run in this order
PUBLIC = (
    "load", "VLM", "inspect", "ComponentMap", "Component", "scheme", "Scheme", "Plan", "size", "Size", "quantized",
    "task", "grid", "one_at_a_time", "sweep", "Study", "rank", "recommend", "export", "verify", "report",
    "add_to_atlas", "predict_frontier", "UserError",
)  # fmt: skip

# the tables that a plug-in is added to, and what one of their rows is
TABLES = {
    "METHODS": "a method: the function that quantizes, its widths, defaults and settings",
    "PRESETS": "a published method that is a row of settings of another",
    "OVERHEAD": "the bits that a method stores beside its codes",
    "TASKS": "a task of the embedded models",
    "DATASETS": "a published data set, read from a folder",
    "SCORERS": "a rule that scores a user's own data",
    "RETRIEVAL_TASKS": "a retrieval task of the embedded models",
    "RETRIEVAL_DATASETS": "a published data set for retrieval",
    "FAMILIES": "a family of models, as data",
    "FORMATS": "an export format",
    "RUNTIMES": "what a runtime can load, as data",
    "FILES": "the bits that a format of packed weights stores of one weight",
    "ESTIMATORS": "an estimator of importance",
    "SCORES": "a score of components that needs calibration data alone",
    "SAMPLERS": "a search that chooses plans one after the other",
}


def modules() -> list[Path]:
    return sorted((ROOT / "sensitivity").rglob("*.py"))


def tree() -> str:
    """Every module of the package with the first line of its docstring, folder by folder."""
    lines: list[str] = []
    folders = sorted({path.parent for path in modules()}, key=lambda folder: folder.relative_to(ROOT).parts)
    for folder in folders:
        depth = len(folder.relative_to(ROOT).parts)
        lines.append("  " * (depth - 1) + f"{folder.name}/")
        found = sorted(folder.glob("*.py"), key=lambda path: (path.stem != "__init__", path.stem))
        width = max(len(path.name) for path in found) + 2
        lines += ["  " * depth + f"{path.name:<{width}}{first_line(path)}" for path in found]
    return fenced("\n".join(lines) + "\n")


def first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


def help_of(verb: str) -> str:
    """What --help prints, at a fixed width."""
    top = parser_of(VERBS)
    choices = next(action.choices for action in top._actions if isinstance(action.choices, dict))
    with patch.dict(os.environ, COLUMNS=WIDTH):
        return fenced(top.format_help() if verb == "sensitivity" else str(choices[verb].format_help()))


def helps() -> str:
    """A section for each verb."""
    return "".join(f"\n## {verb}\n\n{help_of(verb)}" for verb in VERBS)


def reference() -> str:
    """What mkdocstrings is to show: each public name, from where it is defined."""
    found = []
    for name in PUBLIC:
        thing = getattr(sensitivity, name)
        found.append(f"\n::: {thing.__module__}.{thing.__qualname__}\n    options:\n      heading: {name}\n")
    return "".join(found)


def tables() -> str:
    """Each table of plug-ins with the file that holds it."""
    home = {name: path.relative_to(ROOT).as_posix() for path in modules() for name in assigned(path)}
    rows = [f"| `{name}` | `{home[name]}` | {what} |" for name, what in TABLES.items()]
    return "\n" + "\n".join(["| table | file | one row is |", "|---|---|---|", *rows]) + "\n\n"


def assigned(path: Path) -> set[str]:
    """The names that a module gives a dict at its top level."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return {
        node.target.id
        for node in nodes
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Dict)
    }


def fenced(text: str) -> str:
    return f"```text\n{text}```\n"


MADE: dict[str, Callable[[], str]] = {
    "tree": tree,
    "help": lambda: help_of("sensitivity"),
    "verbs": helps,
    "reference": reference,
    "tables": tables,
}


def rewritten(text: str) -> str:
    return BLOCK.sub(lambda match: match[1] + MADE[match["name"]]() + match[3], text)


if __name__ == "__main__":
    for page in GENERATED:
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
    print("rewritten:", ", ".join(str(page.relative_to(ROOT)) for page in GENERATED))
