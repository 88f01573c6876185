"""Tasks of lmms-eval: names, metrics, bad input; and where the extra is installed, the library's own run."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmms_sets
import pytest

from sensitivity.cli.arguments import values
from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.types import Example
from sensitivity.tasks.harness import judges, loading, metrics, task_files
from sensitivity.tasks.table import find, task

HERE = importlib.util.find_spec("lmms_eval") is not None
library = pytest.mark.skipif(not HERE, reason=f"lmms-eval is not installed: {task_files.INSTALL}")

# -- names, without the library ---------------------------------------------------------------------------------------


def test_without_the_extra_one_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tasks of lmms-eval need the extra lmms; type pip install --no-deps lmms"):
        find("lmms-eval:chartqa")


@pytest.mark.parametrize(
    ("typed", "tasks"),
    [
        ("lmms-eval:chartqa,textvqa_val", ("lmms-eval:chartqa", "lmms-eval:textvqa_val")),
        ("vqa,lmms-eval:chartqa", ("vqa", "lmms-eval:chartqa")),
        ("lmms-eval:a:some/folder,b", ("lmms-eval:a:some/folder", "lmms-eval:b")),
        ("lmms-eval:a,own.jsonl,b", ("lmms-eval:a", "own.jsonl", "b")),
        ("lmms-eval:a,vqav2:there,b", ("lmms-eval:a", "vqav2:there", "b")),
        ("lmms-eval:a,a", ("lmms-eval:a",)),
    ],
)
def test_the_librarys_name_holds_for_the_tasks_after_it(typed: str, tasks: tuple[str, ...]) -> None:
    assert values.task_names(typed) == tasks


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for lmms-eval's, as far as names go."""
    written = {
        "chartqa/chartqa.yaml": 'dataset_path: a\ntask: "chartqa"  # a comment\ntest_split: test\n',
        "chartqa/lite.yaml": "task: chartqa_lite\r\ndataset_path: a\r\n",
        "pope/pope.yaml": "metric_list:\n  - metric: task\ntask : 'pope'\n",
        "ref/_group.yaml": "group: ref\ntask:\n- ref_a\n  - ref_b\n",
        "broken/_template_yaml": "task: template",
    }
    for name, text in written.items():
        file = tmp_path / "tasks" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    monkeypatch.setattr(task_files, "installed", lambda: tmp_path)
    return tmp_path


def test_names_of_tasks_and_groups(package: Path) -> None:
    known = task_files.find_task_files(package)
    assert known.files.keys() == {"chartqa", "chartqa_lite", "pope"}
    assert known.groups == {"ref": ("ref_a", "ref_b")}
    assert find("lmms-eval:pope")
    for name, message in {
        "lmms-eval:charqa": r"lmms-eval has no task 'charqa' among its 3 \(did you mean chartqa",
        "lmms-eval:ref": r"lmms-eval:ref is a group of tasks; name those that you want: lmms-eval:ref_a,ref_b",
        "lmms-eval:": r"lmms-eval needs the name of a task; type lmms-eval:TASK",
        "lmms-evl:pope": r"unknown task 'lmms-evl:pope'.*lmms-eval:TASK",
    }.items():
        with pytest.raises(UserError, match=message):
            find(name)


# -- metrics, with a task that stands for one of the library's ------------------------------------------------------


class StandIn:
    """A task with documents, a rule and aggregates."""

    def __init__(self, rule: Callable[..., Any], aggregates: dict[str, Callable[..., Any]], lower: str = "") -> None:
        self._filters = [SimpleNamespace(apply=self._first)]
        self.rule, self.aggregates, self.lower = rule, aggregates, lower

    def _first(self, requests: Sequence[Any], docs: Sequence[Any]) -> None:
        for request in requests:
            request.filtered_resps["none"] = request.resps[0]

    def process_results(self, doc: Any, results: Sequence[Any]) -> Any:
        return self.rule(doc, results)

    def aggregation(self) -> dict[str, Callable[..., Any]]:
        return self.aggregates

    def higher_is_better(self) -> dict[str, bool]:
        return {name: name != self.lower for name in self.aggregates}


DOCS = [{"answer": f"a{i}"} for i in range(6)]
EXAMPLES = [Example(f"test-{i:06d}", "c", "all", Path("x.png"), "?", (doc["answer"],)) for i, doc in enumerate(DOCS)]


def scorer(rule: Callable[..., Any], aggregates: dict[str, Callable[..., Any]], lower: str = "") -> metrics.Scorer:
    pytest.importorskip("loguru")
    stand_in: Any = StandIn(rule, aggregates, lower)
    docs: Any = {"test": DOCS}
    return metrics.Scorer("made_up", stand_in, docs, EXAMPLES)


def mean(found: Sequence[float]) -> float:
    return sum(found) / len(found)


def right(doc: Any, results: Sequence[str]) -> float:
    return float(results[0] == doc["answer"])


def test_a_number_for_each_example_is_its_score() -> None:
    found = scorer(lambda doc, results: {"acc": right(doc, results)}, {"acc": mean})
    assert [found.score(text, EXAMPLES[1]) for text in ("a1", "a2")] == [1, 0]
    assert found.metrics()["acc"](["a0", "no", "a2"], EXAMPLES[:3]) == pytest.approx(2 / 3)


def test_a_record_for_each_example_is_aggregated_alone() -> None:
    """MMMU and POPE give records; F1 is no mean of values per example, and accuracy is."""

    def rule(doc: Any, results: Sequence[str]) -> Any:
        return {name: {"right": right(doc, results)} for name in ("f1", "acc")}

    def f1(found: Sequence[Any]) -> float:
        return mean([one["right"] for one in found]) ** 2

    found = scorer(rule, {"f1": f1, "acc": lambda found: mean([one["right"] for one in found])})
    assert found.main == "acc"
    assert found.score("a3", EXAMPLES[3]) == 1
    assert found.metrics()["f1"](["a0", "no"], EXAMPLES[:2]) == pytest.approx(1 / 4)


def test_a_metric_without_a_value_for_each_example_is_refused_in_a_sentence() -> None:
    def spread(found: Sequence[float]) -> float:
        return max(found) - min(found)

    with pytest.raises(UserError, match=r"made_up has no metric with a value for each example \(spread\), so that"):
        scorer(lambda doc, results: {"spread": right(doc, results)}, {"spread": spread})


def test_a_metric_of_which_less_is_better_and_one_that_writes_files_do_not_score() -> None:
    def rule(doc: Any, results: Sequence[str]) -> Any:
        return {"error": 1 - right(doc, results), "submission": results[0], "acc": right(doc, results)}

    found = scorer(rule, {"error": mean, "submission": lambda found, args: None, "acc": mean}, lower="error")
    assert found.main == "acc"
    assert found.metrics().keys() == {"acc"}


def test_an_answer_that_the_rule_stumbles_over_is_named() -> None:
    def rule(doc: Any, results: Sequence[str]) -> Any:
        return {"acc": float({doc["answer"]: "1", "": "0"}.get(results[0], results[0]))}

    found = scorer(rule, {"acc": mean})
    with pytest.raises(UserError, match=r"made_up cannot score the answer 'seven' to test-000002 \(could not convert"):
        found.score("seven", EXAMPLES[2])


def test_what_a_rule_changes_in_its_document_is_gone_at_the_next_answer() -> None:
    calls: list[str] = []

    def rule(doc: Any, results: Sequence[str]) -> Any:
        calls.append(results[0])
        return {"acc": right(doc, results)}

    found = scorer(rule, {"acc": mean})
    before = len(calls)
    assert [found.score("a4", EXAMPLES[4]), found.score("a4", EXAMPLES[4])] == [1, 1]
    assert len(calls) == before + (0 if "a4" in calls[:before] else 1), "an answer is scored once"


def test_a_rule_that_guesses_guesses_the_same_for_every_plan() -> None:
    """MMMU's rule takes any option where an answer names none."""
    found = [scorer(lambda doc, results: {"acc": random.random()}, {"acc": mean}) for _ in range(2)]
    before = random.getstate()
    first, second = ([one.score(text, EXAMPLES[0]) for text in ("x", "y")] for one in found)
    assert len({*first, *second}) == 1
    assert found[0].score("x", EXAMPLES[1]) != first[0], "each example has a guess of its own"
    assert random.getstate() == before


def test_a_judge_is_found_wherever_it_hides() -> None:
    judge = types.ModuleType("lmms_eval.llm_judge.launcher")
    scope: dict[str, Any] = {"__file__": "/x/lmms_eval/tasks/a/utils.py", "judge": judge, "__name__": "utils"}
    exec(
        "def ask(x): return judge.ask(x)\n"
        "class Asker:\n    def run(self, x): return [ask(one) for one in x]\n"
        "asker = Asker()\n"
        "def by_judge(doc, results): return (lambda: asker.run(results))()\n"
        "def by_rule(doc, results): return {'acc': len(results)}\n",
        scope,
    )
    assert judges.judge_of(scope["by_judge"]) == "lmms_eval.llm_judge.launcher"
    assert judges.judge_of(scope["by_rule"]) is None
    with pytest.raises(UserError, match=r"made_up asks another model to judge .* \(lmms_eval.llm_judge.launcher\)"):
        loading.check_scored_by_rule("made_up", {"process_results": scope["by_judge"]})
    loading.check_scored_by_rule(
        "made_up", {"process_results": scope["by_rule"], "metric_list": [{"aggregation": mean}]}
    )


# -- the library itself -----------------------------------------------------------------------------------------------

MODEL = "embedded:scenes-llava"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return {name: lmms_sets.write(name, folder) for name in lmms_sets.SETS}


def by_the_library(models: Sequence[Path], sets: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    """lmms-eval's own run on model folders, in a process of its own; None of our code takes part."""
    for name, data in sets.items():
        (folder / f"{name}.yaml").write_text(
            f"include: {task_files.file_of(name)}\ntask: {name}\ndataset_path: {data}\ndataset_name: null\n"
            "dataset_kwargs:\n  load_from_disk: true\n"
        )
    script = Path(__file__).with_name("lmms_library.py")
    # in the folder, since the library writes files for submission where it is started
    done = subprocess.run([sys.executable, script, folder, *models], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


@library
def test_scores_are_those_of_the_librarys_own_run(sets: dict[str, Path], tmp_path: Path) -> None:
    """Example by example, at full precision and for a plan, whose export the library loads by itself."""
    from sensitivity import export, grid, inspect, load, sweep
    from sensitivity.models.checkpoint import model_folder

    vlm = load(MODEL)
    parts = inspect(vlm, by="part")
    plans = grid(parts, bits=(3,), method="uniform")
    names = [f"lmms-eval:{name}:{data}" for name, data in sets.items()]
    study = sweep(vlm, parts, plans, names, tmp_path / "study")
    plan = next(one for one in plans if not one.is_native)
    export(study, plan, tmp_path / "fake", format="fake", model=MODEL)
    (tmp_path / "yaml").mkdir()
    runs = by_the_library([model_folder(MODEL), tmp_path / "fake"], sets, tmp_path / "yaml")
    assert task(names[2]).examples[1].pieces, "mmmu_val puts images among its texts"
    for ours, theirs in zip((study.examples(study.native), study.examples(plan)), runs, strict=True):
        for name in sets:
            assert ours is not None
            rows = ours[ours["task"] == name]
            main = task(f"lmms-eval:{name}:{sets[name]}").notes[0].split()[2]
            alone = loading.library_task(name, str(sets[name])).aggregation()[main]
            samples = {one["doc_id"]: one for one in theirs[name]["samples"]}
            assert len(rows) >= len(samples) / 2, name
            columns = ("example", "answer", "score", "kind")
            for number, answer, score, kind in zip(*(rows[column] for column in columns), strict=True):
                sample = samples[int(number.rpartition("-")[2])]
                assert sample["filtered_resps"] in ([answer], answer), (name, number)
                value = sample[main] if isinstance(sample[main], int | float) else alone([sample[main]])
                guessed = name == "mmmu_val" and kind == "multiple-choice"  # where an answer names no option
                assert guessed or score == pytest.approx(value), (name, number)
            if len(rows) == len(samples) and name != "mmmu_val":
                assert rows["score"].mean() == pytest.approx(theirs[name]["results"][f"{main},none"], abs=1e-4), name


@library
def test_training_examples_calibrate_where_there_are_some(tmp_path: Path, sets: dict[str, Path]) -> None:
    apart = lmms_sets.write("docvqa_val", tmp_path, train=True)
    assert len(task(f"lmms-eval:docvqa_val:{apart}").examples) == 8, "nothing is left out"
    assert {one.id[:5] for one in task(f"lmms-eval:docvqa_val:{apart}", "calibration").examples} == {"train"}
    many = lmms_sets.write("chartqa", tmp_path, n=60)
    evaluated, calibration = (task(f"lmms-eval:chartqa:{many}", split) for split in ("evaluation", "calibration"))
    assert {one.cluster for one in evaluated.examples}.isdisjoint({one.cluster for one in calibration.examples})
    assert len(evaluated.examples) + len(calibration.examples) == 60
    few, more = (task(f"lmms-eval:chartqa:{many}", n=n) for n in (10, 20))
    assert {one.id for one in few.examples} < {one.id for one in more.examples}
    assert {one.kind for one in more.examples} == {"human_test", "augmented_test"}
    assert len({one.cluster for one in more.examples}) < 20, "questions about one image are one cluster"


@library
def test_data_that_are_not_there_are_named_with_the_command_that_fetches_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        task("lmms-eval:scienceqa_img")
    loads = "load_dataset('lmms-lab-encoder/ScienceQA', 'ScienceQA-IMG')"
    assert f'; type python -c "from datasets import load_dataset; {loads}" or name a folder' in str(error.value)
    assert "the data of lmms-eval:scienceqa_img are not on this machine, or not all of them" in str(error.value)


@library
def test_the_hubs_cache_is_read_and_half_a_download_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from lmms_eval.api.task import _resolve_hf_datasets_cache_dir

    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    _resolve_hf_datasets_cache_dir.cache_clear()
    try:
        folder = lmms_sets.write("chartqa", tmp_path)
        saved = datasets.load_from_disk(str(folder))["test"]
        cached = tmp_path / "cache" / "lmms-lab-encoder___chart_qa" / "default" / "0.0.0" / "abc"
        cached.mkdir(parents=True)
        shutil.copy(next((folder / "test").glob("*.arrow")), cached / "chart_qa-test.arrow")
        splits = datasets.SplitDict(dataset_name="chart_qa")
        splits.add(datasets.SplitInfo("test", num_bytes=1, num_examples=len(saved), dataset_name="chart_qa"))
        names = {"config_name": "default", "dataset_name": "chart_qa", "builder_name": "parquet"}
        info = datasets.DatasetInfo(features=saved.features, splits=splits, version="0.0.0", **names)
        info.write_to_directory(str(cached))
        found, same = task("lmms-eval:chartqa"), task(f"lmms-eval:chartqa:{folder}")
        assert [one.id for one in found.examples] == [one.id for one in same.examples]
        assert found.fingerprint == same.fingerprint
        loading.library_task.cache_clear()
        (cached / "chart_qa-test.arrow").unlink()
        with pytest.raises(UserError, match=r"not all of them .*load_dataset\('lmms-lab-encoder/ChartQA'\)"):
            task("lmms-eval:chartqa")
    finally:
        _resolve_hf_datasets_cache_dir.cache_clear()
        loading.library_task.cache_clear()


@library
def test_a_damaged_folder_is_refused_in_a_sentence(tmp_path: Path) -> None:
    wanted = "it takes what save_to_disk wrote of lmms-lab-encoder/ChartQA, with the split test"
    with pytest.raises(UserError, match=f"as the data of lmms-eval:chartqa .there is no such folder.; {wanted}"):
        task(f"lmms-eval:chartqa:{tmp_path}/gone")
    other = lmms_sets.write("chartqa", tmp_path / "other", split="lite")
    with pytest.raises(UserError, match=f"it has lite.; {wanted}"):
        task(f"lmms-eval:chartqa:{other}")
    half = lmms_sets.write("chartqa", tmp_path / "half")
    arrow = next(half.rglob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:2000])
    with pytest.raises(UserError, match=f"cannot read {half} as the data of lmms-eval:chartqa"):
        task(f"lmms-eval:chartqa:{half}")
    arrow.unlink()
    with pytest.raises(UserError, match=f"cannot read {half} as the data of lmms-eval:chartqa"):
        task(f"lmms-eval:chartqa:{half}")


@library
def test_few_missing_images_are_counted_and_many_refused(tmp_path: Path) -> None:
    import datasets

    saved = datasets.load_from_disk(str(lmms_sets.write("chartqa", tmp_path, n=120, train=True)))

    def without(count: int) -> Path:
        rows = saved["test"].cast_column("image", datasets.Image(decode=False)).to_list()
        for row in rows[:count]:
            row["image"]["bytes"] = row["image"]["bytes"][:200]
        changed = datasets.Dataset.from_list(rows, features=saved["test"].features)
        datasets.DatasetDict({**saved, "test": changed}).save_to_disk(str(tmp_path / f"without-{count}"))
        return tmp_path / f"without-{count}"

    found = task(f"lmms-eval:chartqa:{without(1)}")
    assert len(found.examples) == 119
    assert found.notes[-1].startswith("1 of 120 examples left out: no usable image (")
    with pytest.raises(UserError, match="at most 2 % may be left out; fetch the data again"):
        task(f"lmms-eval:chartqa:{without(20)}")


@library
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mmvet", "asks another model to judge the answers"),
        ("seedbench_ppl", r"asks for multiple_choice; tasks whose answers are written \(generate_until\) can be swept"),
        ("activitynetqa", "asks about videos"),
        ("gsm8k", "shows no images"),
    ],
)
def test_tasks_that_cannot_be_swept_are_refused_before_their_data_are_read(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=message):
        task(f"lmms-eval:{name}")


@library
def test_nothing_is_written_beside_the_data_and_nothing_stays_switched(sets: dict[str, Path]) -> None:
    import datasets
    from PIL import ImageFile

    def switches() -> list[bool]:
        return [datasets.is_caching_enabled(), datasets.are_progress_bars_disabled(), datasets.config.HF_HUB_OFFLINE]

    before = switches()
    files = sorted(sets["refcoco_bbox_rec_val"].rglob("*"))
    loading.library_task.cache_clear()
    assert task(f"lmms-eval:refcoco_bbox_rec_val:{sets['refcoco_bbox_rec_val']}").examples
    assert sorted(sets["refcoco_bbox_rec_val"].rglob("*")) == files, "refcoco maps its data, which datasets would keep"
    assert switches() == before
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@library
@pytest.mark.slow
def test_names_are_those_of_the_librarys_own_index() -> None:
    from lmms_eval.tasks import TaskManager

    manager, known = TaskManager(), task_files.find_task_files(task_files.installed())
    assert set(known.files) <= set(manager.all_tasks)
    assert set(manager.all_subtasks) <= set(known.files)
