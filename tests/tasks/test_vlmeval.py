"""Data sets of VLMEvalKit: names, scores, bad input, its process; and where it is installed, the library's own run."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import vlmeval_sets

from sensitivity.spec.errors import UserError
from sensitivity.tasks.harness import vlmeval, vlmeval_library
from sensitivity.tasks.harness.vlmeval_scores import Evaluation
from sensitivity.tasks.table import find, task

HERE = importlib.util.find_spec("vlmeval") is not None
library = pytest.mark.skipif(not HERE, reason=f"VLMEvalKit is not installed: {vlmeval.INSTALL}")
MODEL = "embedded:scenes-llava"

# -- a small package that stands for the library's, with the files of which something is used -------------------------

SMP = """
import os
def download_file(url, filename=None): raise AssertionError("downloaded")
def file_size(file, unit="GB"): return 9
def toliststr(text): return eval(text) if text[0] == "[" else [text]
"""
IMAGE_MCQ = """
import base64, os, sys
import pandas as pd
import vlmeval.smp as smp
from vlmeval.judging import build_judge

print("noise on standard output")

class Letters:
    TYPE, MODALITY, DATASET_MD5 = "MCQ", "IMAGE", {"Known": "0"}
    kinds = ("Known", "Judged", "Dies", "Stumbles", "Online", "Other")

    @classmethod
    def supported_datasets(cls): return list(cls.kinds)

    def __init__(self, dataset):
        self.name, file = dataset, os.path.join(os.environ["LMUData"], f"{dataset}.tsv")
        if not os.path.exists(file) or dataset in self.DATASET_MD5:
            smp.download_file(f"https://there/{dataset}.tsv", file)
        self.data = pd.read_csv(file, sep="\\t", dtype=str)

    def build_prompt(self, line):
        path = os.path.join(self.img_root, line["index"] + ".png")
        with open(path, "wb") as file: file.write(base64.b64decode(line["image"]))
        kind = "video" if self.name == "Other" else "image"
        return [{"type": kind, "value": path}, {"type": "text", "value": line["question"] + "?"}]

    def evaluate(self, eval_file, **kwargs):
        data = pd.read_pickle(eval_file)
        if self.name == "Judged": build_judge(**kwargs)
        if self.name == "Online": __import__("socket").create_connection(("127.0.0.1", 9))
        if self.name == "Stumbles": raise KeyError("rule")
        if self.name == "Dies" and "die" in list(data["prediction"]):
            sys.exit(print("no room left", file=sys.stderr))
        data["hit"] = (data["prediction"] == data["answer"]).astype(int)
        data.to_csv(eval_file.replace(".pkl", "_result.tsv"), sep="\\t", index=False)
        return pd.DataFrame({"split": ["none"], "Overall": [data["hit"].mean()], "squared": [data["hit"].mean() ** 2]})

class Videos(Letters):
    MODALITY, kinds = "VIDEO", ("Moving",)
class Turns(Letters):
    TYPE, kinds = "MT", ("Talk",)
class CustomMCQDataset(Letters):
    kinds = ()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the package; its tables go beside it."""
    files = {
        "smp/__init__.py": SMP, "smp/file.py": SMP, "dataset/image_mcq.py": IMAGE_MCQ,
        "judging.py": "def build_judge(**_): raise AssertionError('asked')",
        "dataset/lacking.py": "import a_package_that_is_not_there\nNAMES = ['Lacking']",
        "__init__.py": "raise AssertionError('the whole library is imported')",
    }  # fmt: skip
    for name, text in files.items():
        file = tmp_path / "vlmeval" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(vlmeval, "installed", lambda: tmp_path / "vlmeval")
    vlmeval._process_of.cache_clear()
    return tmp_path


def table(folder: Path, name: str, n: int = 24, **changed: str) -> str:
    """Write a table of questions about images of scenes; return the name of its task."""
    rows = [
        {"index": i, "question": f"q{i}", "A": "a", "B": "b", "answer": "AB"[i % 2], "image": vlmeval_sets.encoded(one)}
        for i, one in enumerate(task("vqa", n=n).examples)
    ]
    pd.DataFrame(rows).assign(**changed).to_csv(folder / f"{name}.tsv", sep="\t", index=False)
    return f"vlmeval:{name}:{folder}"


def test_without_the_extra_one_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"data sets of VLMEvalKit need the extra vlmeval; type pip install --no-deps ms"
    ):
        find("vlmeval:MMStar")


def test_prompts_images_and_scores_come_from_the_process(package: Path) -> None:
    named = table(package / "data", "Known", n=200)
    found, calibration = (task(named, split) for split in ("evaluation", "calibration"))
    assert found.notes[0] == ("scored by VLMEvalKit: the column hit of its tables, whose mean is its figure Overall")
    assert len(found.examples) + len(calibration.examples) == 200
    assert not {one.cluster for one in found.examples} & {one.cluster for one in calibration.examples}
    every = (*found.examples, *calibration.examples)
    assert {one.id: (one.prompt, one.answers) for one in every} == {
        str(i): (f"q{i}?", ("AB"[i % 2],)) for i in range(200)
    }
    scenes = {one.cluster for one in task("vqa", n=200).examples}
    assert len({one.cluster for one in every}) == len(scenes) < 200, "questions about one image are one cluster"
    said = ["A"] * len(found.examples)
    right = [float(one.answers[0] == "A") for one in found.examples]
    assert found.scores(said, found.examples) == right
    assert [found.score("B", one) for one in found.examples] == [1 - one for one in right]
    mean = sum(right) / len(right)
    assert found.measure(said) == pytest.approx({"Overall": mean, "squared": mean**2})
    first, second = found.examples[:2]
    assert found.scores(["A", "B", "A", ""], [first, first, second, second]) == [
        found.score(text, one) for text, one in (("A", first), ("B", first), ("A", second), ("", second))
    ]


def test_what_a_data_set_cannot_do_is_one_sentence(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = package / "data"
    monkeypatch.setenv("LMUData", str(package))
    for name, message in {
        "Judged": r"vlmeval:Judged cannot be swept: it asks another model to judge",
        "Online": r"vlmeval:Online cannot be swept: it wants the network",
        "Stumbles": r"vlmeval:Stumbles cannot be swept: VLMEvalKit fails on it \(KeyError: 'rule'\)",
        "Other": r"vlmeval:Other cannot be swept: it shows video, and only images can be shown",
        "Moving": r"vlmeval:Moving asks about videos",
        "Talk": r"vlmeval:Talk asks in several turns",
        "Lacking": r"vlmeval:Lacking needs the package a_package_that_is_not_there; type pip install a_package_that",
    }.items():
        with pytest.raises(UserError, match=message):
            task(table(data, name))
    for name, message in {
        "vlmeval:Judged": r"the data of vlmeval:Judged are not on this machine: there is no .*; type curl -L -o .*ged",
        "vlmeval:nothing": r"VLMEvalKit has no data set 'nothing', and there is no .*nothing.tsv of your own",
        f"vlmeval:Known:{data}/gone": r"there is no folder .*gone with the table Known.tsv; VLMEvalKit keeps",
        "vlmeval:": r"vlmeval needs the name of a task; type vlmeval:TASK, such as vlmeval:MMStar",
        "vlmeval:../Known": r"vlmeval takes the name of a data set, such as vlmeval:MMStar, and not",
    }.items():
        with pytest.raises(UserError, match=message):
            task(name)


def test_the_librarys_own_folder_holds_published_tables_only(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMUData", str(package / "data"))
    named = table(package / "data", "Known")
    with pytest.raises(
        UserError, match=r"Known.tsv is not the published file, or not all of it; .*vlmeval:NAME:FOLDER"
    ):
        task("vlmeval:Known")
    assert task(named).examples


def test_a_table_of_your_own_needs_options_or_a_rule(package: Path) -> None:
    assert task(table(package / "data", "own")).notes[0].startswith("scored by VLMEvalKit: the column hit")
    broken = package / "data" / "half.tsv"
    broken.write_text("index\tquestion\n1\tq\n")
    with pytest.raises(UserError, match=r"half.tsv needs the columns index, question, answer and image"):
        task(f"vlmeval:half:{package / 'data'}")
    with pytest.raises(UserError, match=r"two questions with one index"):
        task(table(package / "data", "twice", index="7"))
    with pytest.raises(UserError, match="at most 2 % may be left out; fetch the table again"):
        task(table(package / "data", "damaged", image="bm8gaW1hZ2U="))


def test_a_process_that_ends_tells_its_last_words_and_leaves_nothing(package: Path) -> None:
    found = task(table(package / "data", "Dies"))
    (image,) = {one.image.file for one in found.examples[:1]}  # type: ignore[union-attr]
    assert image.exists()
    with pytest.raises(UserError, match=r"the process of vlmeval:Dies has ended: no room left"):
        found.score("die", found.examples[0])
    with pytest.raises(UserError, match=r"has ended: no room left"):
        found.score("B", found.examples[1])
    vlmeval._process_of.cache_clear()
    del found
    gc.collect()
    assert not image.exists()
    assert not image.parent.parent.exists()


def test_the_process_ends_with_the_one_that_started_it(package: Path) -> None:
    """Also where that one is killed, and cannot say so."""
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom sensitivity.tasks.harness import vlmeval\n"
        f"vlmeval.installed = lambda: Path({str(package / 'vlmeval')!r})\n"
        f"vlmeval.vlmeval_task('own', {str(package / 'data')!r}, 'evaluation', 9, 0)\n"
        "children = Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text()\n"
        "print(children, flush=True)\ntime.sleep(60)\n"
    )
    table(package / "data", "own")
    started = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    (child,) = map(int, started.stdout.readline().split())
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    started.stdout.close()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            break
        subprocess.run(["sleep", "0.1"], check=True)
    assert not Path(f"/proc/{child}").exists()


# -- which of the library's values scores an answer -------------------------------------------------------------------


class StandIn:
    """A data set whose evaluation writes columns and returns figures, by functions of what is right."""

    def __init__(self, column: Any, figure: Any) -> None:
        self.data = pd.DataFrame({"index": range(12), "answer": [f"a{i}" for i in range(12)]})
        self.column, self.figure = column, figure

    def evaluate(self, eval_file: str, **_: object) -> object:
        data = pd.read_pickle(eval_file)
        right = (data["prediction"] == data["answer"]).to_numpy()
        if self.column:
            data.assign(value=self.column(right)).to_csv(eval_file.replace(".pkl", "_a.tsv"), sep="\t", index=False)
        return self.figure(right)


RIGHT = [(i, f"a{i}") for i in range(12)]


def chosen(column: Any, figure: Any) -> tuple[str, list[float]]:
    stand_in: Any = StandIn(column, figure)
    found = Evaluation(stand_in)
    return found.choose(RIGHT), found.scores([(3, "a3"), (4, "no"), (3, "no")])


def test_a_column_is_the_score_where_its_mean_is_a_figure() -> None:
    by, scores = chosen(lambda right: right * 1, lambda right: {"one": {"Overall": 100 * right.mean()}})
    assert by == "the column value of its tables, whose mean is its figure one Overall"
    assert scores == [1, 0, 0]


def test_a_column_of_which_less_is_better_is_none_and_a_figure_of_each_question_is() -> None:
    """As DocVQA, whose column has distances, and whose mean is near the figure where half of the answers are right."""
    by, scores = chosen(lambda right: 1 - right, lambda right: pd.DataFrame({"Overall": [100 * right.mean()]}))
    assert by == "its figure Overall of each question alone"
    assert scores == [1, 0, 0]


def test_a_figure_of_pairs_is_none_and_the_column_scores_without_it() -> None:
    """As MME, whose figure fails where a second question is missing."""

    def pairs(right: Any) -> dict[str, float]:
        return {"score": sum(right[i] * right[i + 1] for i in range(0, len(right), 2))}

    by, scores = chosen(lambda right: right * 1.0, pairs)
    assert by == "the column value of its tables (none of its figures is a mean over questions)"
    assert scores == [1, 0, 0]


def test_a_column_that_depends_on_other_answers_is_none() -> None:
    with pytest.raises(UserError, match=r"has no value for each question that tells right answers from wrong ones"):
        chosen(lambda right: right * right.mean(), lambda right: {"largest": right.max() * 1.0})


def test_an_answer_stays_the_text_that_it_was() -> None:
    """A table of text would read 007 as 7, and None as nothing."""
    seen: list[Any] = []
    stand_in: Any = SimpleNamespace(
        data=pd.DataFrame({"index": [0, 1], "answer": ["x", "y"]}),
        evaluate=lambda file, **_: seen.extend(pd.read_pickle(file)["prediction"]),
    )
    Evaluation(stand_in).run([(0, "007"), (1, "None")])
    assert seen == ["007", "None"]


# -- the library itself -----------------------------------------------------------------------------------------------


@library
def test_scores_are_those_of_the_librarys_own_run(tmp_path: Path) -> None:
    """Example by example, at full precision and for a plan, whose export is loaded by the other run itself."""
    from sensitivity import export, grid, inspect, load, sweep
    from sensitivity.models.checkpoint import model_folder

    data = tmp_path / "data"
    data.mkdir()
    for name in vlmeval_sets.SETS:
        vlmeval_sets.write(name, data)
    vlm = load(MODEL)
    parts = inspect(vlm, by="part")
    plans = grid(parts, bits=(3,), method="uniform")
    study = sweep(vlm, parts, plans, [f"vlmeval:{name}:{data}" for name in vlmeval_sets.SETS], tmp_path / "study")
    plan = next(one for one in plans if not one.is_native)
    export(study, plan, tmp_path / "fake", format="fake", model=MODEL)
    script, names = Path(__file__).with_name("vlmeval_run.py"), ",".join(vlmeval_sets.SETS)
    models = [model_folder(MODEL), tmp_path / "fake"]
    done = subprocess.run(
        [sys.executable, script, vlmeval.installed(), tmp_path / "out", names, *models],
        env={**os.environ, "LMUData": str(data)}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    runs = json.loads((tmp_path / "out" / "results.json").read_text())
    differing = 0
    for ours, theirs in zip((study.examples(study.native), study.examples(plan)), runs, strict=True):
        assert ours is not None
        for name in vlmeval_sets.SETS:
            rows = ours[ours["task"] == name].set_index("example")
            assert len(rows) >= 5, name
            for example, row in rows.iterrows():
                assert row["answer"].strip() == theirs[name]["answers"][example], (name, example)
                assert row["score"] == pytest.approx(score(theirs[name]["tables"], name, example)), (name, example)
                differing += 0 < row["score"] < 1 or row["score"] == 1
    assert differing > 10, "answers that score nothing would prove little"


def score(tables: dict[str, dict[str, list[Any]]], name: str, example: str) -> float:
    """The score of an example in the tables that the library wrote."""
    for written in tables.values():
        place = [str(one) for one in written["index"]].index(example)
        for column in ("hit", "score"):
            if column in written:
                return float(written[column][place])
        if name == "DocVQA_VAL":  # its rule: 1 - the smallest distance, and 0 from one half on
            nearest = 1 - min(eval(written["eval_match"][place]))
            return nearest if nearest >= 0.5 else 0.0
        if "eval_score" in written:
            return float(written["eval_score"][place])
    raise AssertionError(f"no score of {name} in {list(tables)}")


def test_a_pool_of_one_thread_has_what_the_library_calls() -> None:
    """VCR calls apply_async(), and others name the number of processes."""
    with vlmeval_library._one_thread(processes=16, maxtasksperchild=50) as pool:
        assert pool.apply_async(abs, args=(-1,)).get() == 1
        assert list(pool.imap_unordered(abs, [-2])) == pool.map(abs, [-2]) == [2]
