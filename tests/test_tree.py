"""The shape of the code: rooms and their order, no cycles, what is loaded when, and pages made from the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
import readme
from forked import forked

PACKAGE = readme.ROOT / "sensitivity"
MODULES = sorted(PACKAGE.rglob("*.py"))
ROOF = {"__init__.py", "__main__.py"}  # the two files that stand in no folder

# Imports run along these floors, from a later one to an earlier one; folders of one floor do not know each other.
FLOORS = (
    ("spec",),
    ("models", "tasks", "quantize"),
    ("study",),
    ("measure", "analysis"),
    ("formats",),
    ("api",),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path): path for path in MODULES}


def imports(path: Path) -> Iterator[str]:
    """The modules of our own that a file imports, anywhere in it, for types alone too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sensitivity":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in NAMES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NAMES)


@cache
def graph() -> dict[str, set[str]]:
    return {name: set(imports(path)) - {name} for name, path in NAMES.items()}


def room(name: str) -> str:
    return name.split(".")[1]


def breaks_order(name: str, other: str) -> bool:
    """Whether an import runs against the order of the floors, or to another folder of the same one."""
    return room(name) != room(other) and FLOOR[room(other)] >= FLOOR[room(name)]


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """A walk that comes back to where it began; nothing where there is none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_every_file_stands_in_a_room() -> None:
    for path in MODULES:
        inside = path.relative_to(PACKAGE).parts
        assert inside[0] in FLOOR if len(inside) > 1 else inside[0] in ROOF, path
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(FLOOR)


def test_no_folder_is_crowded() -> None:
    for folder in {path.parent for path in MODULES}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 14, f"{folder} has {len(files)} files; give it rooms"


@pytest.mark.parametrize("name", [name for name in NAMES if name.count(".")])
def test_imports_run_along_the_order(name: str) -> None:
    if name == "sensitivity.__main__":
        return
    wrong = [other for other in graph()[name] if other.count(".") == 0 or breaks_order(name, other)]
    assert not wrong, f"{name} imports {wrong}"


def test_the_test_above_would_notice() -> None:
    assert breaks_order("sensitivity.analysis.a", "sensitivity.measure.b")
    assert breaks_order("sensitivity.spec.a", "sensitivity.cli.b")
    assert not breaks_order("sensitivity.cli.a", "sensitivity.spec.b")


def test_no_cycles_between_files() -> None:
    assert cycle(graph()) == []


def test_no_cycles_between_folders() -> None:
    folders: dict[str, set[str]] = {}
    for name, others in graph().items():
        here = dotted(NAMES[name].parent / "__init__.py")
        folders.setdefault(here, set()).update(dotted(NAMES[other].parent / "__init__.py") for other in others)
    assert cycle({here: others - {here} for here, others in folders.items() if here != "sensitivity"}) == []


def test_cycles_are_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_public_name_is_a_module_of_the_package() -> None:
    """`from sensitivity import sweep` must give the function, whatever was imported before."""
    import sensitivity

    modules = {name.split(".")[1] for name in NAMES if name.count(".") == 1}
    assert not modules & set(sensitivity.__all__)


VERBS = PACKAGE / "cli" / "verbs"  # each file is named after its command, and many a command after a public function


def public_functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}


def test_no_public_function_is_named_like_a_module_or_a_folder() -> None:
    """Such a name means two things: one of them hides the other wherever both are imported."""
    files = [path for path in MODULES if not path.is_relative_to(VERBS) and path.parent != PACKAGE]
    modules = {path.parent.name if path.name == "__init__.py" else path.stem for path in files}
    shared = {path: names for path in files if (names := public_functions(path) & modules)}
    assert shared == {PACKAGE / "cli" / "main.py": {"main"}}


@cache
def defines(path: Path) -> set[str]:
    """The names that a file defines or imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
    return names


@pytest.mark.parametrize("path", sorted((readme.ROOT / "experiments").rglob("*.py")), ids=lambda path: path.stem)
def test_experiments_use_names_that_exist(path: Path) -> None:
    """Most are run once a year; mypy lets them use what a module has only imported."""
    tree, modules = ast.parse(path.read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sensitivity."):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in NAMES:
                    modules[alias.asname or alias.name] = defines(NAMES[full])
                else:
                    assert alias.name in defines(NAMES[str(node.module)]), full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert node.attr in modules[node.value.id], f"{node.value.id}.{node.attr}"


# -- what is loaded when ------------------------------------------------------------------------------------------


def loaded(code: str) -> set[str]:
    """The modules that are in memory after some code has run in a fresh process."""
    script = f"{code}\nimport sys; print(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


HEAVY = {"torch", "transformers", "pandas", "sklearn", "optuna", "numpy", "matplotlib", "shap"}
ANALYSIS = [name for name in NAMES if name.startswith(("sensitivity.analysis", "sensitivity.study"))]


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import sensitivity", HEAVY),
        ("import sensitivity.cli.main as cli; cli.parser_of(cli.VERBS)", HEAVY),
        ("import sensitivity.spec.plan, sensitivity.spec.components, sensitivity.spec.sizes", HEAVY),
        (f"import {', '.join(ANALYSIS)}", {"torch", "transformers"}),
        ("import sensitivity.api.sweeping, sensitivity.models.loading", {"scipy.stats", "scipy.signal", "sklearn"}),
    ],
    ids=["package", "command line", "spec", "analysis", "sweep"],
)
def test_heavy_libraries_are_not_loaded(code: str, absent: set[str]) -> None:
    found = loaded(code)
    assert not found & absent
    assert ("torch" in found) == ("models.loading" in code)  # or this test would see nothing


ORDERS = {
    "the verbs": ["api.sweeping", "api.exporting", "api.recommending"],
    "the table wing": ["analysis.importance.ranking", "analysis.reporting.page"],
    "the command line": ["cli.main", "cli.verbs.sweep", "cli.verbs.report"],
    "nothing": [],
}
SAME = """
import importlib, types
import sensitivity
for name in {modules!r}:
    importlib.import_module(f'sensitivity.{{name}}')
found = {{name: getattr(sensitivity, name) for name in sensitivity.__all__}}
for name in ('api.sweeping', 'api.exporting', 'cli.verbs.sweep', 'cli.verbs.report', 'formats.table'):
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
    assert forked(SAME.format(modules=ORDERS[order])) == "same\n"


# -- who does what --------------------------------------------------------------------------------------------------


def test_nobody_but_cli_prints_or_reads_argv() -> None:
    for path in MODULES:
        if path.relative_to(PACKAGE).parts[0] not in ("cli", "__main__.py"):
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert not names & {"print", "argparse"}, path


LIMIT = 5  # uses of `Any` per 1,000 lines; imports count


def test_few_values_have_the_type_any() -> None:
    """`Any` switches the type checker off: a misspelled field is then found only when the line runs."""
    for folder in sorted({path.relative_to(PACKAGE).parts[0] for path in MODULES if path.parent != PACKAGE}):
        text = "\n".join(path.read_text(encoding="utf-8") for path in (PACKAGE / folder).rglob("*.py"))
        uses, lines = len(re.findall(r"\bAny\b", text)), len(text.splitlines())
        assert uses <= LIMIT * max(lines, 1000) / 1000, f"{folder}: {uses} in {lines} lines"


UNITS = re.compile(r"[*/] ?(8|1)e(6|9)\b")  # megabytes and gigabytes, of bytes or of bits


def test_bytes_become_megabytes_and_gigabytes_in_one_file() -> None:
    files = [*MODULES, *PACKAGE.rglob("*.html")]
    found = {path.name for path in files for line in path.read_text(encoding="utf-8").splitlines()
             if UNITS.search(line) and "flops" not in line}  # fmt: skip
    assert UNITS.search('f"{size / 1e9:.2f} GB"')
    assert found <= {"sizes.py"}


FAMILIES = ("blip", "llava", "qwen", "paligemma", "idefics", "mllama", "florence")


def test_model_families_are_named_in_models_alone() -> None:
    for path in MODULES:
        if path.relative_to(PACKAGE).parts[0] not in ("models", "formats", "cli"):
            code = ast.unparse(_without_docstrings(ast.parse(path.read_text()))).lower()
            code = code.replace("embedded:scenes-llava", "")
            assert not [family for family in FAMILIES if family in code], path


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_say_what_they_are_and_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    assert first.endswith("."), "the first line is a sentence"
    assert 3 <= len(first.split()) <= 25, "and one that is read at once"
    assert "\n" not in first
    assert len(text.splitlines()) <= 400


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


def test_only_one_file_reads_what_a_trial_stores() -> None:
    """Optuna's trials are read and written in trial.py; identity.py holds what a study as a whole stores."""
    naming = {path.relative_to(PACKAGE).as_posix() for path in MODULES if "user_attr" in path.read_text("utf-8")}
    assert naming == {"study/trial.py", "study/identity.py"}


def test_only_one_file_says_how_much_of_a_plans_key_is_shown() -> None:
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in MODULES}
    assert [name for name, text in texts.items() if re.search(r"^KEY_LENGTH = ", text, re.M)] == ["spec/plan.py"]
    assert not [name for name, text in texts.items() if re.search(r"plan\.key\[:\d", text)]


def test_only_one_file_knows_the_names_in_a_studys_folder() -> None:
    names = ('"journal.log"', '"storage.url"', '"queue"', '"examples"', '"verify"', '"rankings"', '"exports"')
    paths = PACKAGE / "study" / "storage" / "paths.py"
    assert all(name in paths.read_text(encoding="utf-8") for name in names)
    joined = ("/ " + name for name in (*names, '"report"'))
    wrong = {
        path.relative_to(PACKAGE).as_posix(): name
        for name in joined
        for path in MODULES
        if name in path.read_text(encoding="utf-8") and path != paths
    }
    assert not wrong
