"""The parts of the README that are made from the code: `python tests/readme.py` writes them, a test compares them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from sensitivity.cli import VERBS, parser

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- (?P<name>[\w: .-]+) -->\n```\w*\n).*?(```\n<!-- end -->)", re.DOTALL)


def tree() -> str:
    """Every module of the package with the first line of its docstring."""
    lines = ["sensitivity/"]
    for folder in [ROOT / "sensitivity", *sorted(p for p in (ROOT / "sensitivity").iterdir() if p.is_dir())]:
        modules = sorted(folder.glob("*.py"), key=lambda path: (path.stem != "__init__", path.stem))
        if not modules:
            continue
        indent = "  "
        if folder.name != "sensitivity":
            lines.append(f"  {folder.name}/")
            indent = "    "
        width = max(len(path.name) for path in modules) + 2
        lines += [f"{indent}{path.name:<{width}}{first_line(path)}" for path in modules]
    return "\n".join(lines) + "\n"


def first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


def help_of(verb: str) -> str:
    """What --help prints, at a fixed width."""
    top = parser()
    if verb == "sensitivity":
        return top.format_help()
    choices = next(action.choices for action in top._actions if isinstance(action.choices, dict))
    return str(choices[verb].format_help())


def rewritten(text: str) -> str:
    def block(match: re.Match[str]) -> str:
        kind, _, name = match["name"].partition(": ")
        return match[1] + (tree() if kind == "tree" else help_of(name)) + match[3]

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    import os

    os.environ["COLUMNS"] = "110"
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
    missing = [verb for verb in VERBS if f"<!-- help: {verb} -->" not in README.read_text(encoding="utf-8")]
    print(f"README.md rewritten; verbs without a help block: {', '.join(missing) or 'none'}")
