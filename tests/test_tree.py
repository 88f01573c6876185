"""The shape of the code: who imports whom, what is loaded when, and that the documents say what is there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import readme

PACKAGE = readme.ROOT / "sensitivity"
MODULES = sorted(PACKAGE.rglob("*.py"))
VALUES = {
    "errors",
    "fields",
    "schema",
    "planfile",
    "files",
    "components",
    "plan",
    "limits",
    "runtimes",
    "loadable",
    "exported",
}
VALUES |= {"standard_output"}
VALUES |= {"threads", "ticker"}
TORCH = {"models", "quantize", "tasks", "evaluate", "replay", "drafts", "shards", "sweep", "export"}
TORCH |= {"preflight", "probe", "passes", "searching", "batches", "whole_prompts", "shared_images", "answer_tokens"}
TORCH |= {"halving"}
ABOVE = {"verbs", "exporting", "cli", "terminal", "__init__", "__main__"}
# the study: table wing, and the only thing of it that the torch wing may use
DOOR = {"trials", "examples", "records", "place", "rows", "scores", "storage", "glance", "turns", "contenders"}
DOOR |= {"patience"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def wing(name: str) -> str:
    for names, answer in ((VALUES, "values"), (TORCH, "torch"), (ABOVE, "above"), (DOOR, "door")):
        if name in names:
            return answer
    return "table"


def imports(path: Path) -> set[str]:
    """The rooms of our own package that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sensitivity":
            module = node.module or ""
            rooms = [module] if "." in module else [f"sensitivity.{alias.name}" for alias in node.names]
            found |= {name.split(".")[1] for name in rooms if not name.endswith("__version__")}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("sensitivity.")}
    return found


ALLOWED = {
    "values": {"values"},
    "door": {"values", "door"},
    "torch": {"values", "torch", "door"},
    "table": {"values", "table", "door"},
    "above": {"values", "torch", "table", "door", "above"},
}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_wings_meet_in_trials_alone(path: Path) -> None:
    mine = wing(room(path))
    wrong = {name for name in imports(path) if wing(name) not in ALLOWED[mine]}
    assert not wrong, f"{room(path)} ({mine}) imports {wrong}"


def test_only_verbs_knows_both_wings() -> None:
    both = {room(path) for path in MODULES if {"torch", "table"} <= {wing(name) for name in imports(path)}}
    assert both <= {"verbs", "exporting", "terminal"}  # the terminal knows their types alone, to print them


def loaded(code: str) -> set[str]:
    """The top-level modules that are in memory after some code has run in a fresh process."""
    script = f"{code}\nimport sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


HEAVY = {"torch", "transformers", "pandas", "sklearn", "optuna", "numpy", "matplotlib", "shap"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import sensitivity", HEAVY),
        ("import sensitivity.cli.main as cli; cli.parser_of(cli.VERBS)", HEAVY),
        ("import sensitivity.plan, sensitivity.components", HEAVY),
        ("import sensitivity.importance", {"torch", "transformers"}),
        ("import sensitivity.allocate, sensitivity.search, sensitivity.report", {"torch", "transformers"}),
    ],
)
def test_heavy_libraries_are_not_loaded(code: str, absent: set[str]) -> None:
    assert not loaded(code) & absent


def test_the_test_above_would_notice() -> None:
    assert "torch" in loaded("import sensitivity.models")


ORDERS = {
    "a module that has a verb's name": ["sweep", "report", "export"],
    "the verbs": ["verbs"],
    "the table wing": ["importance", "report"],
    "the command line": ["cli", "exporting"],
}
SAME = """
import importlib, sys, types
import sensitivity
for name in {modules!r}:
    importlib.import_module(f'sensitivity.{{name}}')
found = {{name: getattr(sensitivity, name) for name in sensitivity.__all__}}
for name in ('sweep', 'report', 'export', 'exporting', 'verbs'):
    importlib.import_module(f'sensitivity.{{name}}')
from sensitivity import export, grid, inspect, load, rank, recommend, report, sweep
for name, one in found.items():
    assert not isinstance(one, types.ModuleType), name
    assert getattr(sensitivity, name) is one, name
    assert getattr(importlib.import_module(f'sensitivity.{{sensitivity._HOMES[name]}}'), name) is one, name
for name in ('export', 'grid', 'inspect', 'load', 'rank', 'recommend', 'report', 'sweep'):
    assert globals()[name] is found[name], name
print('same')
"""


@pytest.mark.parametrize("order", ORDERS)
def test_public_names_are_the_same_objects_whatever_was_imported_before(order: str) -> None:
    """In a process of its own: what is imported first must not hide a verb, and later imports must not either."""
    code = SAME.format(modules=ORDERS[order])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr


def test_nobody_but_cli_prints_or_reads_argv() -> None:
    for path in MODULES:
        if room(path) not in ("cli", "terminal", "__main__"):
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert not names & {"print", "argparse"}, path


def test_model_families_are_named_in_models_alone() -> None:
    families = ("blip", "llava", "qwen", "paligemma", "idefics", "mllama", "florence")
    for path in MODULES:
        if room(path) not in ("models", "cli"):
            code = ast.unparse(_without_docstrings(ast.parse(path.read_text()))).lower()
            code = code.replace("embedded:scenes-llava", "")
            assert not [family for family in families if family in code], path


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_say_what_they_are_and_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(text)) or ""
    assert doc.splitlines()[0].endswith((".", "…", ":", ";", "`")) is True or len(doc.splitlines()[0]) > 20
    assert "\n" not in doc.split("\n\n")[0], "the first line says it all"
    assert len(text.splitlines()) <= 420


@pytest.mark.parametrize("page", readme.GENERATED, ids=lambda page: page.name)
def test_generated_blocks_are_what_the_code_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert readme.rewritten(text) == text, "run `python tests/readme.py`"
    assert readme.BLOCK.search(text)


def test_no_machine_paths() -> None:
    files = subprocess.run(
        ["git", "ls-files"], cwd=readme.ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    bad = "/" + "work/"
    for name in files:
        path = readme.ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".log", ".json", ".html", "") and path.is_file():
            assert bad not in path.read_text(encoding="utf-8", errors="ignore"), name
