"""What is installed: its name in every instruction, a wheel in a clean environment, imports without POSIX modules."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from forked import forked

import sensitivity

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ON_POSIX_ALONE = ("fcntl", "grp", "pwd", "resource", "termios")


def tracked(under: str = ".") -> list[Path]:
    """Files of the repository; without git, all that are there."""
    listed = subprocess.run(["git", "ls-files", under], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines()]
    ignored = {"__pycache__", ".venv", ".git", "build"}
    return [file for file in (ROOT / under).rglob("*") if file.is_file() and not ignored & set(file.parts)]


def test_every_instruction_installs_this_project_and_an_extra_that_it_has() -> None:
    """`sensitivity` on the package index is another project."""
    wrong, extras = [], set()
    for file in tracked():
        if file.suffix not in (".py", ".md", ".toml", ".txt", ".ipynb", ".html") or file == Path(__file__):
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            named = line.replace("\\", "")
            if re.search(r"(?<!vlm-)sensitivity\[[a-z]|pip install \S*(?<![-\w])sensitivity\b", named):
                wrong.append(f"{file.relative_to(ROOT)}: {line.strip()}")
            for some in re.findall(r"vlm-sensitivity\[([a-z,]+)\]", named):
                extras |= set(some.split(","))
    assert wrong == []
    assert {"tasks", "adapters", "bnb", "peers", "ray"} <= extras <= set(PROJECT["optional-dependencies"])


ALL = """
import builtins, importlib, pkgutil, sys
real = builtins.__import__
def without(name, globals=None, *rest, **how):
    if name in sys.argv[1:] and (globals or {}).get("__name__", "").startswith("sensitivity"):
        raise ImportError(name)  # libraries know which system they are on, and would stumble over half of one
    return real(name, globals, *rest, **how)
builtins.__import__ = without
import sensitivity
names = [found.name for found in pkgutil.walk_packages(sensitivity.__path__, "sensitivity.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""


def test_all_of_it_can_be_imported_where_there_are_no_posix_modules() -> None:
    assert int(forked(ALL, ON_POSIX_ALONE).splitlines()[-1]) > 100


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    for file in [*tracked("sensitivity"), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))]:
        target = folder / "source" / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    done = subprocess.run([*build, str(folder / "source")], capture_output=True, text=True)
    if done.returncode and "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("no package index from which to get setuptools")
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    assert built.name.startswith("vlm_sensitivity-")
    return built


def test_type_checkers_see_the_public_names_where_they_are_defined() -> None:
    """Names are imported on first use, which a type checker cannot follow: a block that never runs says it again."""
    tree = ast.parse((ROOT / "sensitivity" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    said = {
        name.asname: str(node.module).removeprefix("sensitivity.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert said == sensitivity._HOMES


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    wanted = {str(file.relative_to(ROOT)) for file in tracked("sensitivity")}
    assert any(name.endswith("model.safetensors") for name in wanted)
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == wanted


# the demo, with two widths of the four and fewer resamples
SHORTER = """
import sys
from sensitivity.cli.main import main
from sensitivity.cli.verbs import demo
whole = demo._without_runtime
demo._without_runtime = lambda args: [
    line.replace("--bits 2,3,4,8", "--bits 2,8") + " --bootstraps 2" * line.startswith("rank") for line in whole(args)
]
sys.exit(main())
"""


def test_the_wheel_in_a_clean_environment_runs_the_demo(wheel: Path, tmp_path: Path) -> None:
    """Its dependencies are borrowed from here, to download nothing; the package itself is the wheel's."""
    place = tmp_path / "clean"
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    packages = place / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    borrowed = [path for path in sys.path if path.endswith("site-packages")] or site.getsitepackages()
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--ignore-installed", str(wheel)], check=True, capture_output=True)
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = [str(python), "-c", "import sensitivity; print(sensitivity.__file__)"]
    assert Path(subprocess.check_output(where, text=True, cwd=tmp_path, env=alone).strip()).is_relative_to(packages)
    usage = subprocess.check_output([str(place / "bin" / "sensitivity"), "--help"], text=True, cwd=tmp_path, env=alone)
    assert usage.startswith("usage: sensitivity")
    demo = [str(python), "-c", SHORTER, "demo", "--n", "6", "--out", str(tmp_path / "demo"), "--json"]
    done = subprocess.run(demo, capture_output=True, text=True, cwd=tmp_path, env=alone)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert "</html>" in (tmp_path / "demo" / "report" / "index.html").read_text()
