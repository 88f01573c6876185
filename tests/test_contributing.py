"""The method that CONTRIBUTING.md shows, taken from the page and used through the public functions."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sensitivity import Study, export, inspect, one_at_a_time, rank, recommend, scheme, size, sweep
from sensitivity.cli.main import main
from sensitivity.models.vlm import VLM
from sensitivity.quantize.methods import METHODS
from sensitivity.quantize.solving import fake_quantize
from sensitivity.quantize.sources import SOURCES
from sensitivity.spec.errors import UserError
from sensitivity.spec.stored_bits import OVERHEAD

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture
def shown(request: pytest.FixtureRequest) -> Iterator[str]:
    """The code on the page, executed unless a test says no; the tables are as before afterwards."""
    tables = (METHODS, SOURCES, OVERHEAD)
    before = [dict(table) for table in tables]
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    try:
        if getattr(request, "param", True):
            exec(compile(code, "pow2.py", "exec"), vars(types.ModuleType("pow2")))
        yield code
    finally:
        for table, own in zip(tables, before, strict=True):
            table.clear()
            table.update(own)  # type: ignore[arg-type]


@pytest.mark.parametrize("shown", [False], indirect=True)
def test_the_command_line_takes_it_by_name(
    shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    also = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Own:\n    a: int\n"
    (tmp_path / "pow2.py").write_text(shown)
    (tmp_path / "json.py").write_text(also)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    words = "sweep embedded:scenes-llava --task vqa --method pow2 --bits 4 --by part --n 4 --out run --workers 1 --json"
    assert main(words.split()) == 2
    assert "unknown method 'pow2'" in json.loads(capsys.readouterr().out)["error"]
    monkeypatch.setenv("SENSITIVITY_PLUGINS", f"json.py:json:{tmp_path / 'pow2.py'}")
    assert main(words.split()) == 0
    capsys.readouterr()
    assert {trial.plan["vision"].method for trial in Study(tmp_path / "run").trials() if not trial.plan.is_native} == {
        "pow2"
    }
    for named, said in {
        "nothing.py": ", and there is no such file",
        "nothing_here": ", which cannot be imported (ModuleNotFoundError: ",
        "broken.py": ", which cannot be imported (ZeroDivisionError: division by zero)",
    }.items():
        monkeypatch.setenv("SENSITIVITY_PLUGINS", named)
        assert main(["methods", "--json"]) == 2
        assert json.loads(capsys.readouterr().out)["error"].startswith(f"SENSITIVITY_PLUGINS names {named}{said}")


def test_it_is_about_forty_lines(shown: str) -> None:
    assert 30 <= len(shown.splitlines()) <= 45


def test_it_goes_the_whole_way(
    shown: str, scenes_llava: VLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = inspect(scenes_llava, by="part")
    plans = one_at_a_time(parts, bits=(2, 4), method="pow2")
    study = sweep(scenes_llava, parts, plans, tasks=["vqa"], out=tmp_path / "study", n=24)
    assert study.counts()["done"] == len(plans)
    assert "language" in rank(study, bootstraps=2, thorough=False).order
    choice = recommend(study, bpw=6.0)
    assert any(one is not None and one.method == "pow2" for _, one in choice.plan.schemes)
    export(study, choice.plan, tmp_path / "out", format="fake", model=scenes_llava)
    assert main(["methods", "--json"]) == 0
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)["methods"]}
    assert listed["pow2"]["stored"]["4"] == pytest.approx(4 + 8 / 4096)
    bits = size(parts, plans[1]).bits
    assert bits < size(parts, one_at_a_time(parts, bits=(2, 4), method="rtn")[1]).bits


def test_it_keeps_what_it_says(shown: str) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    for row in fake_quantize(weight, scheme("pow2", 4)):
        assert float(torch.diff(row.unique()).min().log2()) % 1 == 0
    errors = [float((fake_quantize(weight, scheme("pow2", bits)) - weight).square().sum()) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(UserError, match="pow2 is always per row and symmetric"):
        scheme("pow2", 4, group=32)
    with pytest.raises(UserError, match="pow2 takes 2 to 8 bits, not 1"):
        scheme("pow2", 1)
