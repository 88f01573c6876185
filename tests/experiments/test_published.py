"""The published studies: each runs small from end to end, and its page says what was measured and published."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
from few import few

from experiments.published import importance_table
from experiments.published.__main__ import main, to_run
from experiments.published.declaration import PublishedScore, PublishedStudy, alone, mixed
from experiments.published.page import Measured, importance, measure, observations, verdict
from experiments.published.table import STUDIES
from sensitivity.spec.plan import Scheme
from sensitivity.study.scores import summarize
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Example, Task, mean_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models and data, created by the first study that needs them."""
    return tmp_path_factory.mktemp("smoke")


# one of each model and page; methods and tasks have tests of their own
SOME = ["blip2_uniform_coco", "llava_gptq_gqa", "geochat_grounding"]


@pytest.mark.parametrize("name", few(STUDIES, SOME))
def test_a_study_runs_small_from_end_to_end(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([name, "--smoke", str(folder)])
    text = (folder / "runs" / name / "published.md").read_text()
    assert capsys.readouterr().out.endswith(text)
    assert text.startswith(f"# {STUDIES[name].title}\n\n    python -m experiments.published {name} --smoke\n")
    assert "\n## " in text
    study = Study(folder / "runs" / name)
    assert {trial.state.name for trial in study.trials()} == {"COMPLETE"}
    assert 2 <= len(study.trials()) <= 4  # full precision and at most three plans
    assert study.meta["n"] == 6


@pytest.mark.parametrize("name", ["blip2_awq_flickr", "geochat_grounding", "llava_gptq_gqa"])
@pytest.mark.usefixtures("briefly_timed")
def test_a_dry_run_predicts_a_study_and_writes_nothing(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([name, "--smoke", str(folder), "--dry-run", "--out", str(folder / "dry")])
    text = capsys.readouterr().out
    assert all(word in text for word in ("GFLOP/s", "time", "disk", "host memory"))
    assert not (folder / "dry").exists()


@pytest.mark.usefixtures("briefly_timed")
def test_a_dry_run_for_machines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["blip2_uniform_coco", "--smoke", str(folder), "--dry-run", "--json", "--out", str(folder / "dry")])
    found = json.loads(capsys.readouterr().out)
    assert found["plans"] == 4
    assert found["total"]["seconds"] > 0


@pytest.mark.usefixtures("undrawn")
def test_the_command_on_the_page_names_what_was_typed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["llava_awq_gqa", "--smoke", str(folder)])
    model, data, out = folder / "models" / "llava", folder / "data" / "gqa", folder / "typed"
    words = ["--model", str(model), "--data", str(data), "--n", "5", "--seed", "3", "--calibration-n", "4"]
    main(["llava_awq_gqa", *words, "--plans", "1", "--out", str(out)])
    assert f"python -m experiments.published llava_awq_gqa {' '.join(words)} --plans 1" in capsys.readouterr().out
    assert (out / "report").is_dir()
    assert Study(out).meta["n"] == 5
    assert Study(out).meta["seed"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["geochat_scenes"], "name the folder of ucmerced and aid with --data FOLDER, or type --smoke"),
        (["geochat_scene"], r"unknown study 'geochat_scene'; choose from .*\(did you mean geochat_scenes\?\)"),
        ([], "name a study, such as blip2_gptq_coco; --list shows all of them"),
        (["llava_awq_gqa", "--data", "x", "--bits=4"], "--bits=4 is decided by the study; leave it out, or use"),
        (["llava_awq_gqa", "--data", "x", "--executor", "ray"], "--executor is decided by the study"),
    ],
)
def test_what_is_wrong_with_a_command_is_said(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=f"error: {message}"):
        main(words)


def test_every_study_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STUDIES)
    assert len(STUDIES) == 18


def test_the_table_of_importance_reads_what_the_others_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted.study(tmp_path / "blip2_awq_gqa", {"gqa": lambda bits: bits[:, 0]}, levels=(4,))
    importance_table.main(["--runs", str(tmp_path)])
    text = (tmp_path / "importance_of_parts.md").read_text()
    assert text in capsys.readouterr().out
    assert "Not run yet: `python -m experiments.published llava_awq_gqa --data FOLDER`." in text
    assert "Not run yet: `python -m experiments.published blip2_awq_gqa" not in text
    assert "Not ranked here: 1 usable trial" in text


@pytest.mark.parametrize(
    ("ours", "published", "half_width", "said"),
    [
        (Measured(1.0, 0.9, 1.1), 1.05, None, "agrees, by our interval alone: the published score has none"),
        (Measured(1.0, 0.9, 1.1), 1.15, None, "differs, by our interval alone: the published score has none"),
        (Measured(1.0, 0.9, 1.1), 1.15, 0.12, "agrees"),  # hypot(.1, .12) = .156
        (Measured(1.0, 0.9, 1.1), 1.16, 0.12, "differs"),
        (Measured(1.0, 0.9, 1.5), 1.4, 0.1, "agrees"),  # the side that faces the published score counts
        (Measured(1.0, 0.9, 1.5), 0.6, 0.1, "differs"),
        (Measured(1.0), 1.0, 0.1, "ours has no interval"),
        (Measured(1.0), 1.0, None, "ours has no interval, nor has the published score"),
    ],
)
def test_a_difference_is_judged_against_both_intervals(
    ours: Measured, published: float, half_width: float | None, said: str
) -> None:
    assert verdict(ours, published, half_width) == said


class Answers:
    """A study of which only the answers of one plan are known."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def examples(self, _: object) -> Any:
        return self.rows


def test_the_interval_of_any_metric_is_that_of_a_mean_where_it_is_one() -> None:
    """Leaving out a twentieth of the images at a time gives the clustered standard error of a mean."""
    import pandas as pd

    draw = np.random.default_rng(0)
    examples, answers, means = [], [], []
    for image in range(400):
        lucky = draw.random()
        for j in range(3):
            examples.append(Example(f"{image}-{j}", f"{image}", "all", np.zeros((2, 2, 3), np.uint8), "?", ("yes",)))
            means.append(float(draw.random() < lucky))
            answers.append("yes" if means[-1] else "no")
    score = mean_of(lambda answer, example: float(answer in example.answers))
    asked = Task("x", tuple(examples), lambda answer, example: 0.0, metrics={"right": score})
    rows = pd.DataFrame({"task": "x", "example": [e.id for e in examples], "answer": answers}).sample(
        frac=1, random_state=0
    )
    found = measure(Answers(rows), asked, None, "right", pd.Series())  # type: ignore[arg-type]
    known = summarize(means, [e.cluster for e in examples])
    assert found.value == pytest.approx(known.mean)
    assert found.high - found.low == pytest.approx(known.high - known.low, rel=0.35)
    assert found.low < np.mean(means) < found.high
    few = dataclasses.replace(asked, examples=asked.examples[:60])
    assert math.isnan(measure(Answers(rows), few, None, "right", pd.Series()).low)  # type: ignore[arg-type]


ROW = PublishedStudy(
    "title", "source", "model", "llava", ("made:{data}",), "codes", unit="score",
    shares={"": {"vision": 60.0, "connector": 1.0, "language": 39.0}},
)  # fmt: skip


def test_importance_stands_beside_the_published_and_finds_what_was_planted(tmp_path: Path) -> None:
    study = planted.study(tmp_path, {"made": lambda bits: -planted.damage(bits[:, 0], 1)}, levels=(2, 4, 16))
    text = "\n".join(importance(ROW, study, bootstraps=2))
    vision = next(line for line in text.splitlines() if line.startswith("| vision |"))
    assert float(vision.split("|")[2].split()[0]) > 95
    assert "differs, by our interval alone: the published score has none" in vision
    few = planted.study(tmp_path / "few", {"made": lambda bits: bits[:, 0]}, levels=(4,))
    assert "Not ranked here: 1 usable trial" in "\n".join(importance(ROW, few))


def test_another_metric_is_ranked_by_its_own_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = planted.study(tmp_path, {"made": lambda bits: bits[:, 0]})
    table = study.table()
    monkeypatch.setattr(study, "table", lambda: table.assign(**{"made.R@1": table["language"] * 2.0}))
    found = observations(study, "R@1")
    assert found.score.tolist() == (found.bits[:, 2] * 2).tolist()
    assert observations(study, "").score.tolist() == found.bits[:, 0].tolist()
    assert not len(observations(study, "METEOR"))  # which is not measured in a sweep


def test_published_plans_come_first_where_not_all_are_run() -> None:
    parts = planted.parts()
    scores = (PublishedScore({}, 1.0), *alone("vision", {4: 0.5, 8: 0.9}), *mixed({(2, 8, 8): 0.1}))
    study = dataclasses.replace(
        ROW, scores=scores, grid=dict.fromkeys(("vision", "connector", "language"), (2, 4, 8, 16))
    )
    scheme_of = {width: Scheme("codes", width) for width in study.widths}
    assert study.widths == [2, 4, 8]
    every = to_run(study, parts, scheme_of, None)
    assert len(every) == 4**3
    assert every[0].is_native
    some = to_run(study, parts, scheme_of, 8)
    assert some[:4] == every[:4]
    assert [plan.describe() for plan in some[1:4]] == [
        "vision 4 · connector native · language native",
        "vision 8 · connector native · language native",
        "vision 2 · connector 8 · language 8",
    ]
    assert len(set(some)) == 9
    assert to_run(study, parts, scheme_of, 2) == every[:3]


def test_every_published_score_is_of_a_plan_that_is_run_and_a_metric_that_is_measured(folder: Path) -> None:
    """In full, without running: widths, parts and names of metrics are checked against a small model of the family."""
    from experiments.small import datasets, models
    from sensitivity.models.discovery import inspect
    from sensitivity.quantize.scheme_settings import scheme
    from sensitivity.tasks.table import task

    for name, study in STUDIES.items():
        if not (folder / "models" / study.small).exists():
            models.save(study.small, folder / "models" / study.small)
        parts = inspect(str(folder / "models" / study.small), by=study.by)
        scheme_of = {width: scheme(study.method, width) for width in study.widths}
        plans = to_run(study, parts, scheme_of, None)
        assert len(plans) >= max(2, len(study.scores) // 4), name
        asked = []
        for spec in study.tasks:
            about, _, where = spec.format(data=folder / "names" / name).partition(":")
            datasets.WRITE[about](Path(where))
            asked.append(task(f"{about}:{where}", n=60))
        assert {score.metric for score in study.scores} <= {"", *asked[0].metrics}, name
        assert {score.task for score in study.scores} <= set(range(len(asked))), name
        assert set(study.shares or {}) <= {"", *asked[0].metrics}, name
        assert all(set(shares) <= set(parts.names) for shares in (study.shares or {}).values()), name
