"""A study as a table for others: all of it, the same in both formats, and nothing that a spreadsheet runs."""

from __future__ import annotations

import json
from pathlib import Path

import answered
import pandas as pd
import planted
import pytest
from answered import FOUR, NATIVE, TWO

from sensitivity.cli.main import main
from sensitivity.spec.plan import Plan
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Example
from sensitivity.tasks.table import task

FORMULA = "=HYPERLINK(1)"


def given(plan: Plan, example: Example) -> str:
    return example.answers[0] if plan.is_native or len(example.id) % 2 else FORMULA


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    tasks = [task(name, n=10) for name in ("vqa", "scene")]
    return answered.study(tmp_path_factory.mktemp("sharing") / "run", tasks, given, ["vqa", "scene"], n=10)


def written(study: Study, out: Path, *more: str) -> pd.DataFrame:
    assert main(["table", str(study.path), "--out", str(out), *more]) == 0
    return pd.read_csv(out) if out.suffix == ".csv" else pd.read_parquet(out)


def test_one_row_per_plan_and_task_says_what_the_studys_table_says(study: Study, tmp_path: Path) -> None:
    found, wide = written(study, tmp_path / "t.parquet"), study.table().set_index("key")
    assert len(found) == 3 * 2
    for row in found.to_dict("records"):
        mine, name = wide.loc[row["key"]], row["task"]
        assert row["score"] == mine[name]
        assert Plan.from_json(json.loads(row["scheme"])).key == row["key"]
        for column in ("se", "low", "high", "n", "n_images", "nll", "empty"):
            assert row[column] == mine[f"{name}.{column}"]
        assert row["bits.vision"] == mine["vision"]
        if row["key"] != NATIVE.key:
            assert row["delta"] == mine[f"{name}.delta"]
            assert row["to_wrong"] == mine[f"{name}.to_wrong"]
    same = written(study, tmp_path / "t.csv")
    pd.testing.assert_frame_equal(same, found, check_dtype=False)
    card = (tmp_path / "t.parquet.md").read_text()
    assert all(f"| {name} | " in card for name in found)
    assert "| bits.vision | bits of a component, or of its NAME.activations or " in card
    assert "10 examples " in card


def test_one_row_per_example_has_questions_and_answers(study: Study, tmp_path: Path) -> None:
    found = written(study, tmp_path / "e.parquet", "--examples")
    assert len(found) == 3 * 20
    asked = {example.id: example for name in ("vqa", "scene") for example in task(name, n=10).examples}
    for row in found.to_dict("records"):
        example = asked[row["example"]]
        plan = next(plan for plan in (NATIVE, FOUR, TWO) if plan.key == row["key"])
        assert (row["question"], row["right"]) == (example.prompt, "\n".join(example.answers))
        assert row["answer"] == given(plan, example)
    text = written(study, tmp_path / "e.csv", "--examples")
    assert set(text["answer"]) >= {f"'{FORMULA}"}
    assert not text.map(lambda cell: str(cell).startswith("=")).any().any()
    pd.testing.assert_frame_equal(text.drop(columns="answer"), found.drop(columns="answer"), check_dtype=False)
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "e.parquet"), cache_dir=str(tmp_path / "cache"))
    assert len(loaded["train"]) == len(found)


def test_what_others_wrote_is_never_replaced(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.csv"
    written(study, out)
    assert main(["table", str(study.path), "--out", str(out)]) == 2
    assert "add --force" in capsys.readouterr().err
    written(study, out, "--force")
    (tmp_path / "t.csv.md").write_text("# my notes")
    assert main(["table", str(study.path), "--out", str(out), "--force"]) == 2
    assert "is not replaced" in capsys.readouterr().err
    assert (tmp_path / "t.csv.md").read_text() == "# my notes"
    assert main(["table", str(study.path), "--out", str(tmp_path / "t.xlsx")]) == 2
    assert "takes a file such as trials.parquet or trials.csv" in capsys.readouterr().err


def test_an_imported_table_has_rows_and_no_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = planted.study(tmp_path / "run", {"cider": planted.product}, levels=(4, 16))
    assert set(written(made, tmp_path / "t.csv")["task"]) == {"cider"}
    capsys.readouterr()
    assert main(["table", str(made.path), "--out", str(tmp_path / "e.csv"), "--examples"]) == 2
    assert "has no answers to single examples" in capsys.readouterr().err
    assert not (tmp_path / "e.csv").exists()
