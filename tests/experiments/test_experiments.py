"""Experiments import the package and never the reverse; the short ones run, so that none of them stops working."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_vlms
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import experiments
import sensitivity
from experiments.benchmarks.true_shapes import counted

FOLDER = Path(experiments.__file__).parent
ROOT = FOLDER.parent
MODULES = sorted(FOLDER.rglob("*.py"))
PACKAGE = sorted(Path(sensitivity.__file__).parent.rglob("*.py"))
DOCUMENTS = [*sorted((ROOT / "reports").glob("*.md")), FOLDER / "LOG.md", *sorted(ROOT.glob("*.md"))]
DOCUMENTS += sorted((ROOT / "sensitivity").rglob("README.md"))
COMMAND = re.compile(r"python (?:-m ([\w.]+)|((?:experiments|notebooks|tests)/[\w/]+\.py))")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_the_package_imports_no_experiment() -> None:
    assert any("sensitivity" in name for path in MODULES for name in imported(path))  # so the walk sees imports
    for path in PACKAGE:
        assert not [name for name in imported(path) if name.split(".")[0] in ("experiments", "tests")], path


@pytest.mark.parametrize("path", [*MODULES, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_that_a_document_names_is_there(path: Path) -> None:
    for module, script in COMMAND.findall(path.read_text(encoding="utf-8")):
        if script:
            assert (ROOT / script).is_file(), f"{path}: {script}"
        elif module.startswith("experiments"):
            assert importlib.util.find_spec(module) is not None, f"{path}: {module}"


def test_the_walk_over_commands_finds_them() -> None:
    text = "`python -m experiments.methods.cliffs --smoke` and python experiments/parity/exports.py make"
    assert COMMAND.findall(text) == [("experiments.methods.cliffs", ""), ("", "experiments/parity/exports.py")]
    assert sum(len(COMMAND.findall(path.read_text(encoding="utf-8"))) for path in DOCUMENTS) > 15


@pytest.mark.slow
def test_cliffs(tmp_path: Path) -> None:
    words = ["--smoke", "--out", str(tmp_path / "cliffs.md"), "--runs", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "experiments.methods.cliffs", *words]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    text = (tmp_path / "cliffs.md").read_text()
    assert "## embedded:scenes-llava-heavy" in text
    assert "synthetic outliers, same function" in text
    assert text.count("| all |") == 8


def test_operations_are_counted_as_torch_counts_them() -> None:
    """Those of linear layers, attention and the cutting into patches, which is all that a tower multiplies."""
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch's own counter does not know
    model = small_vlms.llava().model.vision_tower.eval()
    pixels = torch.rand(2, 3, *[model.config.image_size] * 2)

    def attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **more: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    with torch.inference_mode():
        with FlopCounterMode(display=False, custom_mapping={operation: attention}) as theirs:
            model(pixels)
        with counted() as found:
            model(pixels)
    assert sum(found) == theirs.get_total_flops() > 0
