"""Tables, plans, studies and exports that are not what they should be: each ends in one sentence, or says why not."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import planted
import pyarrow.parquet as pq
import pytest
from few import few
from referencing import Registry, Resource

from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.atlas import atlas_file
from sensitivity.analysis.atlas.atlas_file import add_to_atlas
from sensitivity.analysis.importance import kept_rankings
from sensitivity.analysis.importance.ranking import rank
from sensitivity.analysis.observations import observations_of
from sensitivity.analysis.recommending.kept_recommendation import recommended, save, what_changed_since
from sensitivity.analysis.recommending.request import PlanRequest
from sensitivity.analysis.reporting.page import report
from sensitivity.api.exporting import export_from, legalize_from
from sensitivity.api.recommending import recommend_each
from sensitivity.cli import main as cli
from sensitivity.formats.writing import manifest
from sensitivity.spec import schema
from sensitivity.spec.components import ComponentMap, Kept
from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.files import PACKAGE, csv_bytes
from sensitivity.spec.plan import Plan
from sensitivity.study import answers as examples
from sensitivity.study import exports
from sensitivity.study.study import Study

RAW = ("Errno", "Traceback", "Error:", "a defect", "not of type", "NoneType", "object has no", "codec", "Arrow", "\n")


def sentence(error: BaseException) -> str:
    """One sentence of ours, for a person."""
    assert isinstance(error, UserError), f"{type(error).__name__}: {error}"
    text = str(error)
    assert not [word for word in RAW if word in text], text
    assert 10 < len(text) < 700, text
    return text


def refused(action: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    assert words in sentence(caught.value)


# -- tables ---------------------------------------------------------------------------------------------------------

HEAD = "v,c,l,cider"
BODY = [f"{v},{c},{w},{v + w}" for v in (2, 4, 8) for c in (4, 8) for w in (2, 4, 8)]
GOOD = "\n".join([HEAD, *BODY, ""])
PARTS = ["--part", "v=vision", "--part", "c=connector", "--part", "l=language"]
SCORE = ["--score", "cider"]


def head(text: str) -> str:
    return GOOD.replace(HEAD, text)


def first(text: str) -> str:
    return GOOD.replace(BODY[0], text)


def parts(*names: str) -> list[str]:
    return [word for column, name in zip("vcl", names, strict=False) for word in ("--part", f"{column}={name}")]


Table = tuple[str | bytes, list[str], str]
# name -> the file, further words, and what the sentence says
TABLES: dict[str, Table] = {
    "a score twice": (GOOD, [*PARTS, *SCORE, *SCORE], "the score 'cider' is named twice"),
    "a.low": (head("v,c,l,a.low"), [*PARTS, "--score", "a.low"], ""),
    "a and a.low": (
        head("v,c,a,a.low"), [*parts("vision", "connector"), "--score", "a", "--score", "a.low"],
        "cannot be called 'a.low': the study's own table",
    ),
    "a and a.delta.se": (
        head("v,c,a,a.delta.se"), [*parts("vision", "connector"), "--score", "a", "--score", "a.delta.se"],
        "cannot be called 'a.delta.se'",
    ),
    "a and a.n": (head("v,c,a,a.n"), [*parts("vision"), "--score", "a.n", "--score", "a"], "cannot be called 'a.n'"),
    "a score named complete": (head("v,c,l,complete"), [*PARTS, "--score", "complete"], "cannot be called 'complete'"),
    "a score named bpw": (head("v,c,l,bpw"), [*PARTS, "--score", "bpw"], "cannot be called 'bpw'"),
    "a score named vision": (head("v,c,l,vision"), [*PARTS, "--score", "vision"], "that is a component"),
    "a tag": (head("v,c,l,<b>"), [*PARTS, "--score", "<b>"], 'cannot be called "<b>"'),
    "a script": (head("v,c,l,<script>x()</script>"), [*PARTS, "--score", "<script>x()</script>"], "cannot be called"),
    "an entity": (head("v,c,l,a&lt;"), [*PARTS, "--score", "a&lt;"], "cannot be called"),
    "a pipe in a name": (head("v,c,l,a|b"), [*PARTS, "--score", "a|b"], "cannot be called"),
    "a terminal's escape": (head("v,c,l,a\x1b[31m"), [*PARTS, "--score", "a\x1b[31m"], "that can be printed, not 'a"),
    "a name of nothing": (head("v,c,l, "), [*PARTS, "--score", " "], "that can be printed, not ' '"),
    "a name too long": (head(f"v,c,l,{'a' * 101}"), [*PARTS, "--score", "a" * 101], "1 to 100 letters"),
    "no such part": (GOOD, [*parts("vison", "connector", "language"), *SCORE], "not 'vison'"),
    "no such group": (GOOD, [*parts("vision.foo", "connector", "language"), *SCORE], "not 'vision.foo'"),
    "no such kind": (GOOD, [*parts("vision.front.mlp", "connector", "language"), *SCORE], "not 'vision.front.mlp'"),
    "deeper than there is": (GOOD, [*parts("vision.front.attn.q"), *SCORE], "not 'vision.front.attn.q'"),
    "a dot at the end": (GOOD, [*parts("vision."), *SCORE], "not 'vision.'"),
    "a dot before": (GOOD, [*parts(".vision"), *SCORE], "not '.vision'"),
    "a block of letters": (GOOD, [*parts("vision.x1"), *SCORE], "not 'vision.x1'"),
    "a block too many": (GOOD, [*parts("vision.123456"), *SCORE], "not 'vision.123456'"),
    "markup for a part": (GOOD, [*parts("vision.<b>"), *SCORE], "not 'vision.<b>'"),
    "a part in a part": (GOOD, [*parts("vision", "vision.front", "language"), *SCORE], "is a part of 'vision'"),
    "a kind in a group": (GOOD, [*parts("vision.end", "vision.end.ff", "language"), *SCORE], "part of 'vision.end'"),
    "a part twice": (GOOD, [*parts("vision", "vision"), *SCORE], "two columns stand for 'vision'"),
    "no part": (GOOD, SCORE, "say what the columns are"),
    "no score": (GOOD, PARTS, "name at least one column of scores"),
    "no such score": (GOOD, [*PARTS, "--score", "bleu"], "unknown column 'bleu'"),
    "no such column": (GOOD, ["--part", "x=vision", *SCORE], "unknown column 'x'"),
    "text for bits": (first("two,4,2,4"), [*PARTS, *SCORE], "holds 'two' in row 1"),
    "half a bit": (first("2.5,4,2,4"), [*PARTS, *SCORE], "2.5 bits in row 1"),
    "no bit": (first("0,4,2,4"), [*PARTS, *SCORE], "0 bits in row 1"),
    "bits below none": (first("-4,4,2,4"), [*PARTS, *SCORE], "-4 bits in row 1"),
    "17 bits": (first("17,4,2,4"), [*PARTS, *SCORE], "17 bits in row 1"),
    "infinite bits": (first("inf,4,2,4"), [*PARTS, *SCORE], "inf bits in row 1"),
    "10^12 bits": (first("1e12,4,2,4"), [*PARTS, *SCORE], "1e+12 bits"),
    "text for a score": (first("2,4,2,high"), [*PARTS, *SCORE], "holds 'high' in row 1"),
    "a huge score": (first("2,4,2,1e300"), [*PARTS, *SCORE], "a score is at most 1,000,000,000"),
    "a formula": (first("2,4,2,=1+1"), [*PARTS, *SCORE], "holds '=1+1' in row 1"),
    "a longer row": (first("2,4,2,4,9"), [*PARTS, *SCORE], "not a table with commas and a header"),
    "longer rows throughout": (
        "\n".join([HEAD, *(f"{row},7" for row in BODY), ""]), [*PARTS, *SCORE], "not a table with commas and a header",
    ),
    "a column twice": (head("v,v,l,cider"), [*PARTS, *SCORE], "two columns named 'v'"),
    "semicolons": (GOOD.replace(",", ";"), [*PARTS, *SCORE], "separates its columns by ';'"),
    "tabs": (GOOD.replace(",", "\t"), [*PARTS, *SCORE], "separates its columns by"),
    "nothing": ("", [*PARTS, *SCORE], "not a table with commas and a header"),
    "a header alone": (HEAD + "\n", [*PARTS, *SCORE], "a header but no rows"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(64), [*PARTS, *SCORE], "not a table with commas and a header"),
    "UTF-16": (GOOD.encode("utf-16"), [*PARTS, *SCORE], "not text in UTF-8"),
    "Latin-1": (GOOD.replace("cider", "sc\xf6re").encode("latin-1"), [*PARTS, *SCORE], "not text in UTF-8"),
    "zero bytes": (b"\0" * 200, [*PARTS, *SCORE], ""),
    "an open quote": (first('"2,4,2,4'), [*PARTS, *SCORE], ""),
    "a size of nothing": (GOOD, [*PARTS, *SCORE, "--numel", "vision=0"], "from 1 to 1,000,000,000,000,000, not '0'"),
    "a size below nothing": (GOOD, [*PARTS, *SCORE, "--numel", "vision=-5"], "not '-5'"),
    "a size beyond all": (GOOD, [*PARTS, *SCORE, "--numel", f"vision={10**30}"], "from 1 to"),
    "a size in words": (GOOD, [*PARTS, *SCORE, "--numel", "vision=many"], "takes a whole number from 1 to"),
    "a size of no part": (GOOD, [*PARTS, *SCORE, "--numel", "audio=5"], "unknown component in --numel 'audio'"),
    "a total too small": (GOOD, [*PARTS, *SCORE, "--total", "5"], "more than the whole model's 5"),
    "a total below none": (GOOD, [*PARTS, *SCORE, "--total", "-5"], "from 1 to"),
    "no such method": (GOOD, [*PARTS, *SCORE, "--method", "qptg"], "unknown method 'qptg'"),
    "blocks of a row": (GOOD, [*PARTS, *SCORE, "--method", "nf4"], "the group of nf4 is a number of weights"),
    "a switch of 4": (GOOD, ["--switch", "c=vision", "--bits", "v", *SCORE], "a switch is 0 or 1"),
    "a switch without bits": (GOOD, ["--switch", "c=vision", *SCORE], "--switch needs --bits"),
}  # fmt: skip
FINE = {"a.low": "no score 'a' stands beside it"}


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, line, words = TABLES[name]
    path, out = tmp_path / "table.csv", tmp_path / "runs" / "run"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    status = cli.main(["import", str(path), *line, "--out", str(out)])
    told = capsys.readouterr().err
    assert status == (0 if name in FINE else 2), told
    if name in FINE:
        assert Study(out).table()["a.low"].notna().all()
        return
    assert told.startswith("error: ")
    assert words in told
    sentence(UserError(told.removeprefix("error: ").rstrip("\n")))
    assert sorted(tmp_path.iterdir()) == [path]  # nothing is left behind


def test_a_pipe_or_a_folder_for_a_table_is_not_waited_for(tmp_path: Path) -> None:
    from sensitivity.study.importing.imported_study import import_table

    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("pipe.csv", "."):
        refused(
            lambda name=name: import_table(tmp_path / name, tmp_path / "run", ["a"], parts={"v": "vision"}),
            "not a file",
        )


# -- studies that were made well, and copies of them that are damaged -----------------------------------------------


def swept(path: Path, count: int = 6) -> Study:
    """A study as a sweep leaves it, answers and all, without a model."""
    study = Study.create(path, planted.parts(), ["vqa"], {"model": "planted", "n": 8, "seed": 0})
    study.enqueue([study.native, *(planted.plan(planted.PARTS, row) for row in planted.grid((2, 4, 8))[:count])])
    run(study)
    return study


def run(study: Study) -> list[Plan]:
    """Whatever waits."""
    last, done = None, []
    while (last := study.ask(last)) is not None:
        study.tell(last, answers(last.plan), {"seconds": 1.0, "versions": {"sensitivity": "0.1.0"}, "path": "fast"})
        done.append(last.plan)
    return done


def answers(plan: Plan, n: int = 8) -> dict[str, list[Any]]:
    share = planted.product(np.array([list(plan.bits().values())], dtype=float))[0]
    return {
        "task": ["vqa"] * n, "example": [f"e{i}" for i in range(n)], "cluster": [f"c{i // 2}" for i in range(n)],
        "kind": ["any"] * n, "score": [float(share * (1 + i % 3) / 3) for i in range(n)], "nll": [0.5] * n,
        "answer": ["yes"] * n,
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`table`: an imported study with two recommendations; `swept`: one with answers."""
    folder = tmp_path_factory.mktemp("made")
    rows = np.vstack([planted.grid((2, 4, 8)), [[16.0] * 3]])
    table = planted.study(folder / "table", {"vqa": planted.product}, 0.01, rows=rows)
    save(table, recommend_each(table, PlanRequest((5.0, 4.0), {"vqa": 1.0})))
    gained = {"mean": 0.1, "low": 0.0, "high": 0.2, "n": 9}
    note = {"format": "gptq", "plan": "all 4", "bpw": 4.0, "bytes": 9, "written": True}
    exports.write_note(table.path, folder / "gone", {**note, "path_gain": {"path": "exposed", "vqa": gained}})
    swept(folder / "swept")
    return folder


@pytest.fixture
def table(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "table", tmp_path / "table"))


@pytest.fixture
def answered(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "swept", tmp_path / "swept"))


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in place; a change that gives something else back is the new content."""
    data = json.loads(file.read_bytes())
    found = change(data)
    file.write_text(json.dumps(data if found is None else found))


def put(at: str, value: Any) -> Callable[[Any], None]:
    """`a.b.0.c`: put a value there."""

    def change(data: Any) -> None:
        *above, last = [int(word) if word.isdigit() else word for word in at.split("/")]
        for word in above:
            data = data[word]
        data[last] = value

    return change


def drop(at: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        *above, last = at.split("/")
        for word in above:
            data = data[word]
        del data[last]

    return change


# -- plans ----------------------------------------------------------------------------------------------------------

SCHEME = {"method": "rtn", "bits": 4, "group": "row", "symmetric": True}
BAD = "cannot be used"
PLANS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a component is missing": (drop("plan/connector"), "missing connector"),
    "a component too many": (put("plan/audio", None), "unknown audio"),
    "no component": (put("plan", {}), BAD),
    "a list of schemes": (put("plan", [1, 2]), BAD),
    "a text": (put("plan", "vision=4"), BAD),
    "no plan": (drop("plan"), "'plan' is missing"),
    "nothing but null": (lambda _: [None], BAD),
    "a list of a number": (lambda _: [5], BAD),
    "a scheme that is 4": (put("plan/vision", 4), "'plan.vision' is 4"),
    "a scheme that is true": (put("plan/vision", True), "'plan.vision' is true"),
    "no method": (drop("plan/vision/method"), "'plan.vision.method' is missing"),
    "a method that is 5": (put("plan/vision", {**SCHEME, "method": 5}), "'plan.vision.method' is 5"),
    "an unknown method": (put("plan/vision", {**SCHEME, "method": "gtpq"}), "did you mean gptq?"),
    "0 bits": (put("plan/vision", {**SCHEME, "bits": 0}), "from 1 to 16"),
    "17 bits": (put("plan/vision", {**SCHEME, "bits": 17}), "from 1 to 16"),
    "-1 bits": (put("plan/vision", {**SCHEME, "bits": -1}), "from 1 to 16"),
    "2.5 bits": (put("plan/vision", {**SCHEME, "bits": 2.5}), "a whole number from 1 to 16"),
    "true bits": (put("plan/vision", {**SCHEME, "bits": True}), "a whole number from 1 to 16"),
    "'4' bits": (put("plan/vision", {**SCHEME, "bits": "4"}), "a whole number from 1 to 16"),
    "a width that nf4 has not": (
        put("plan/vision", {**SCHEME, "method": "nf4", "group": 64, "bits": 3}), "nf4 does not take 3 bits",
    ),
    "a group of 10^12": (put("plan/vision", {**SCHEME, "group": 10**12}), "from 1 to 16,777,216"),
    "a group of 0": (put("plan/vision", {**SCHEME, "group": 0}), "from 1 to 16,777,216"),
    "a group of -1": (put("plan/vision", {**SCHEME, "group": -1}), "'plan.vision.group' is -1"),
    "half a group": (put("plan/vision", {**SCHEME, "group": 0.5}), "'plan.vision.group' is 0.5"),
    "a true group": (put("plan/vision", {**SCHEME, "group": True}), "'plan.vision.group' is true"),
    "a group of columns": (put("plan/vision", {**SCHEME, "group": "column"}), '"tensor", "row"'),
    "a grid that is 1": (put("plan/vision", {**SCHEME, "symmetric": 1}), "true or false"),
    "an unknown field": (put("plan/vision", {**SCHEME, "bitz": 1}), "'plan.vision.bitz' is not a known field"),
    "an unknown setting": (put("plan/vision", {**SCHEME, "settings": {"dampp": 1}}), "unknown setting of rtn 'dampp'"),
    "settings of gptq for rtn": (put("plan/vision", {**SCHEME, "settings": {"damp": 0.1}}), "unknown setting of rtn"),
    "a setting below 0": (
        put("plan/vision", {**SCHEME, "method": "gptq", "settings": {"damp": -1.0}}),
        "is a number from 0 to 10, not -1.0",
    ),
    "a setting in words": (
        put("plan/vision", {**SCHEME, "method": "gptq", "settings": {"damp": "x"}}),
        "is a number from 0 to 10",
    ),
    "a setting that is a list": (put("plan/vision", {**SCHEME, "settings": {"damp": []}}), "settings.damp' is []"),
    "settings that are a list": (put("plan/vision", {**SCHEME, "settings": []}), "'plan.vision.settings' is []"),
    "settings of an imported width": (
        put("plan/vision", {**SCHEME, "method": "codes", "settings": {"a": 1}}), "unknown setting of codes 'a'",
    ),
    "another version": (put("version", 2), "should be 1"),
    "another granularity": (put("by", "thirds"), "should be one of"),
    "no granularity": (put("by", None), "should be one of"),
    "a model that is 5": (put("model", 5), "'model' is 5"),
    "weights that are a text": (put("weights", "all"), "'weights' is \"all\""),
    "a component without weights": (put("weights/vision", []), "'weights.vision' is []"),
    "a size below nothing": (put("size/bpw", -1), "'size.bpw' is -1"),
    "a size in words": (put("size/bytes", "many"), "'size.bytes' is \"many\""),
    "a key of letters": (put("key", "z" * 16), "16 hexadecimal digits"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_plans(table: Path, name: str) -> None:
    change, words = PLANS[name]
    edit(table / "plan.json", change)
    out = table.parent / "out.json"
    refused(lambda: export_from(table / "plan.json", None, out, "plan", False), words)
    refused(lambda: legalize_from(table / "plan.json", "fake", None), words)
    assert not out.exists()


def test_a_plan_of_widths_that_were_never_measured_is_exported_and_said_to_be_so(table: Path) -> None:
    """Its size is known all the same; legalize says what it costs in bytes alone."""
    edit(table / "plan.json", put("plan/vision", {**SCHEME, "method": "codes", "bits": 7}))
    export_from(table / "plan.json", None, table.parent / "out.json", "plan", False)
    _, found = legalize_from(table / "plan.json", "fake", None)
    assert found.predicted_after is None


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda file: file.write_bytes(b""), "not JSON, or was cut short"),
    "half": (lambda file: file.write_bytes(file.read_bytes()[:200]), "not JSON, or was cut short"),
    "bytes": (lambda file: file.write_bytes(bytes(range(256))), "not JSON, or was cut short"),
    "nested 200,000 deep": (lambda file: file.write_text("[" * 200_000), "not JSON, or was cut short"),
    "a number of 10,000 digits": (lambda file: file.write_text("9" * 10_000), "not JSON, or was cut short"),
    "a list": (lambda file: file.write_text("[]"), "should be an object"),
    "a text": (lambda file: file.write_text('"plan"'), "should be an object"),
    "null": (lambda file: file.write_text("null"), "should be an object"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "it is a folder"),
    "a pipe": (lambda file: (file.unlink(), os.mkfifo(file)), "a pipe or a device, not a file"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_plan_no_note_and_no_manifest(table: Path, name: str) -> None:
    change, words = FILES[name]
    change(table / "plan.json")
    refused(lambda: recommended(Study(table)), words)
    refused(lambda: export_from(table / "plan.json", None, table.parent / "out.json", "plan", False), words)
    note = next((table / "exports").glob("*.json"))
    change(note)
    refused(lambda: exports.notes_of(table), "delete it; the export itself is not touched")
    folder = export(table.parent / "export")
    change(folder / manifest.MANIFEST)
    refused(lambda: manifest.read(folder), "export again")


# -- what was recommended -------------------------------------------------------------------------------------------

RECOMMENDED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "provenance is 5": (put("provenance", 5), "'provenance' is 5"),
    "provenance is a list": (put("provenance", []), "'provenance' is []"),
    "asked is a text": (put("provenance/asked", "4 bpw"), "'provenance.asked' is \"4 bpw\""),
    "asked is null": (put("provenance/asked", None), "'provenance.asked' is null"),
    "asked for nothing": (put("provenance/asked/bpw", []), "'provenance.asked.bpw' is []"),
    "asked for -4 bpw": (put("provenance/asked/bpw", [-4]), "'provenance.asked.bpw[0]' is -4"),
    "asked in words": (put("provenance/asked/bpw", "4"), "'provenance.asked.bpw' is \"4\""),
    "weights are a list": (put("provenance/asked/weights", []), "'provenance.asked.weights' is []"),
    "a weight is null": (put("provenance/asked/weights/vqa", None), "'provenance.asked.weights.vqa' is null"),
    "an unknown wish": (put("provenance/asked/speed", 2), "'provenance.asked.speed' is not a known field"),
    "a wish less": (drop("provenance/asked/weights"), "'provenance.asked.weights' is missing"),
    "trials in words": (put("provenance/trials", "many"), "'provenance.trials' is \"many\""),
    "no verdict": (drop("verdict"), "'verdict' is missing"),
    "a verdict of 5": (put("verdict", 5), "'verdict' is 5"),
    "no prediction": (drop("predicted"), "'predicted' is missing"),
    "a prediction for another task": (
        put("predicted", {"x": {"score": 1, "low": 0, "high": 1, "full": 1}}), "it says nothing about 'vqa'",
    ),
    "a prediction of null": (put("predicted/vqa/score", None), "'predicted.vqa.score' is null"),
    "judged by no task here": (put("task_weights", {"x": 1.0}), "'x' is no task here"),
    "a measurement in words": (put("measured", "good"), "'measured' is \"good\""),
    "a measurement of nothing": (put("measured", {}), "'measured.mean' is missing"),
    "candidates that are an object": (put("candidates", {}), "'candidates' is {}"),
    "a rival that is 5": (put("uniform", 5), "'uniform' is 5"),
    "freshness of 1": (put("fresh_examples", 1), "'fresh_examples' is 1"),
    "a budget of 0": (put("budget_bpw", 0), "'budget_bpw' is 0"),
    "another plan than was recommended": (put("plan/vision", None), "as it was changed"),
    "a part of a plan": (drop("plan/vision"), "as it was changed"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECOMMENDED)
def test_recommendations(table: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = RECOMMENDED[name]
    edit(table / "plan.json", change)
    assert cli.main(["report", str(table), "--out", str(table.parent / "report")]) == 2
    told = capsys.readouterr().err
    assert words in told
    sentence(UserError(told.removeprefix("error: ").rstrip("\n")))
    assert not (table.parent / "report").exists()


def test_what_was_recommended_is_read_back_as_it_was_written(table: Path) -> None:
    study = Study(table)
    found = recommend_each(study, PlanRequest((5.0, 4.0), {"vqa": 1.0}))
    save(study, found)
    before = [one.to_json() for one in found]
    assert [one.to_json() for one in recommended(Study(table))] == json.loads(json.dumps(before))
    assert what_changed_since(study, recommended(study)) == []


def test_where_a_study_has_grown_the_old_recommendation_stays_and_the_new_one_is_named(table: Path) -> None:
    study = Study(table)
    old = recommended(study)
    rows = planted.grid((3, 6))
    study.append([planted.plan(planted.PARTS, row) for row in rows], [{"vqa": v} for v in planted.product(rows)])
    now = Study(table)
    assert [one.plan for one in recommended(now)] == [one.plan for one in old]
    told = what_changed_since(now, recommended(now))
    assert told[0].startswith("The study has grown from 28 to 36 plans since this was recommended")
    best = recommend_each(now, PlanRequest((5.0, 4.0), {"vqa": 1.0}))
    assert [one.plan for one in best] != [one.plan for one in old], "the test is to show two different answers"
    for one, was, said in zip(best, old, told[1:], strict=True):
        assert ("the same plan" if one.plan == was.plan else one.plan.describe()) in said


@pytest.mark.usefixtures("undrawn")
def test_a_report_says_what_was_recommended_and_that_the_study_has_grown(table: Path) -> None:
    old = recommended(Study(table))[0]
    rows = planted.grid((3, 6))
    Study(table).append([planted.plan(planted.PARTS, row) for row in rows], [{"vqa": v} for v in planted.product(rows)])
    page = report(Study(table), table.parent / "page", recommended(Study(table)), bootstraps=1).read_text()
    assert f"Use the plan {old.plan.describe()}:" in page
    assert "The study has grown from 28 to 36 plans" in page


# -- journals and what they hold ------------------------------------------------------------------------------------


def said(study: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change what a study says of itself, or with `trial`, what its third trial does."""
    lines = [json.loads(line) for line in (study / "journal.log").read_text().splitlines()]
    trials = [line for line in lines if line["op_code"] == 4]
    if name == "trial":
        change(trials[2]["user_attrs"])
    else:
        change(next(line["user_attr"] for line in lines if name in line.get("user_attr", {})))
    (study / "journal.log").write_text("".join(json.dumps(line) + "\n" for line in lines))


STUDIES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "meta is a list": ("meta", put("meta", []), "'meta' is []"),
    "n in words": ("meta", put("meta/n", "many"), "'meta.n' is \"many\""),
    "a seed of -1": ("meta", put("meta/seed", -1), "'meta.seed' is -1"),
    "a model of null": ("meta", put("meta/model", None), "'meta.model' is null"),
    "rows left out, as a text": ("meta", put("meta/left_out", "all"), "'meta.left_out' is \"all\""),
    "a dtype of ours": ("meta", put("meta/dtype", "float5"), "'meta.dtype' is \"float5\""),
    "no task": ("tasks", put("tasks", []), "'tasks' is []"),
    "a task of null": ("tasks", put("tasks", [None]), "'tasks[0]' is null"),
    "tasks as a text": ("tasks", put("tasks", "vqa"), "'tasks' is \"vqa\""),
    "two tasks of one": ("tasks", put("tasks", ["vqa", "ground"]), "1 score, and it names 2 tasks"),
    "no weight": ("parts", put("parts/weights", []), "'parts.weights' is []"),
    "a weight of 5": ("parts", put("parts/weights", [5]), "'parts.weights[0]' is 5"),
    "a weight without rows": ("parts", put("parts/weights/0/rows", 0), "rows' is 0"),
    "a weight of no part": ("parts", put("parts/weights/0/part", "audio"), "'parts.weights[0].part' is \"audio\""),
    "a weight twice": ("parts", lambda d: d["parts"]["weights"].append(d["parts"]["weights"][0]), "names of their own"),
    "native bits of 0": ("parts", put("parts/native_bits", 0), "'parts.native_bits' is 0"),
    "no granularity": ("parts", put("parts/by", "thirds"), "'parts.by' is \"thirds\""),
    "kept is null": ("parts", put("parts/kept", None), "'parts.kept' is null"),
    "a trial's score in words": ("trial", put("scores/vqa/mean", "high"), "'scores.vqa.mean' is \"high\""),
    "a trial's score of NaN": ("trial", put("scores/vqa/mean", math.nan), "'scores.vqa.mean' is NaN"),
    "a trial's score of infinity": ("trial", put("scores/vqa/mean", math.inf), "'scores.vqa.mean' is Infinity"),
    "a trial's score of null": ("trial", put("scores/vqa/mean", None), "'scores.vqa.mean' is null"),
    "a trial's scores as a list": ("trial", put("scores", [1]), "'scores' is [1]"),
    "a trial without scores": ("trial", drop("scores"), "'scores' is missing"),
    "a trial of another task": ("trial", put("scores", {"x": {"mean": 1.0}}), "'scores.vqa' is missing"),
    "a trial of no example": ("trial", put("scores/vqa/n", 0), "'scores.vqa.n' is 0"),
    "a trial's size in words": ("trial", put("size/bpw", "small"), "'size.bpw' is \"small\""),
    "a trial without size": ("trial", drop("size"), "'size' is missing"),
    "a trial of no size": ("trial", put("size/bpw", 0), "'size.bpw' is 0"),
    "a trial without a plan": ("trial", drop("plan"), "'plan' is missing"),
    "a trial without a key": ("trial", drop("key"), "'key' is missing"),
    "a trial of another key": ("trial", put("key", "0" * 16), "not the one that its key names"),
    "a trial's plan less a part": ("trial", drop("plan/vision"), "for other components"),
    "a trial's plan of 99 bits": ("trial", put("plan/vision/bits", 99), "'plan.vision.bits' is 99"),
    "a trial's versions in words": ("trial", put("versions", "new"), "'versions' is \"new\""),
    "a trial of -1 seconds": ("trial", put("seconds", -1), "'seconds' is -1"),
    "a trial's owner": ("trial", put("owner", "me"), "'owner' is \"me\""),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_studies(table: Path, name: str) -> None:
    what, change, words = STUDIES[name]
    said(table, what, change)
    refused(lambda: rank(Study(table), bootstraps=0), words)


def lines_of(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))


JOURNALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda file: file.write_bytes(b""), "holds no study"),
    "text": (lambda file: file.write_text("hello\nworld\n"), "is damaged (line 1)"),
    "bytes": (lambda file: file.write_bytes(bytes(range(256)) * 9 + b"\n"), "is damaged (line 1)"),
    "a list": (lines_of(lambda lines: [b"[1]\n", *lines]), "is damaged (line 1)"),
    "no op code": (lines_of(lambda lines: [*lines[:3], b"{}\n", *lines[3:]]), "is damaged (line 4)"),
    "an op code of 99": (lines_of(lambda lines: [*lines[:3], b'{"op_code": 99, "worker_id": "x"}\n']), "is damaged"),
    "an op code in words": (lines_of(lambda lines: [b'{"op_code": "x"}\n', *lines]), "is damaged (line 1)"),
    "half a line within": (lines_of(lambda lines: [lines[0], lines[1][:30] + b"\n", *lines[2:]]), "(line 2)"),
    "no first line": (lines_of(lambda lines: lines[1:]), "study"),
    "the first line alone": (lines_of(lambda lines: lines[:1]), "interrupted before its first trial"),
    "no components": (lines_of(lambda lines: [*lines[:3], *lines[4:]]), "interrupted before its first trial"),
    "a trial of no state": (
        lines_of(lambda lines: [*lines[:4], lines[5].replace(b'"state":1', b'"state":77')]),
        "damaged",
    ),
    "nested deep": (lines_of(lambda lines: [*lines, b"[" * 100_000 + b"\n"]), "is damaged"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "it is not a file"),
    "a pipe": (lambda file: (file.unlink(), os.mkfifo(file)), "it is not a file"),
}


@pytest.mark.parametrize("name", JOURNALS)
def test_journals(table: Path, name: str) -> None:
    change, words = JOURNALS[name]
    change(table / "journal.log")
    refused(lambda: Study(table).table(), words)


ADDRESSES: dict[str, bytes] = {
    "nothing": b"", "a word": b"postgres", "bytes": b"\xff\xfe\0", "no driver": b"nonsense://host/db", "no file": b"sqlite:////nowhere/at/all.db",
}  # fmt: skip


@pytest.mark.parametrize("name", ADDRESSES)
def test_addresses(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sensitivity.study.storage.retrying_storage.LONGEST_OUTAGE", 0.0)
    (tmp_path / "storage.url").write_bytes(ADDRESSES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        refused(lambda: Study(tmp_path), "")


def test_a_database_never_hides_the_trials_of_a_journal(table: Path) -> None:
    study, url = Study(table), f"sqlite:///{table.parent}/x.db"
    refused(
        lambda: Study.create(table, study.parts, study.tasks, study.meta, url),
        "in journal.log, and --storage would hide",
    )
    assert not (table.parent / "x.db").exists()
    assert len(Study(table).trials()) == 28
    there = Study.create(table.parent / "there", study.parts, study.tasks, study.meta, url)
    assert (
        Study.create(there.path, study.parts, study.tasks, study.meta).path == there.path
    )  # the same database, unasked
    assert not (there.path / "journal.log").exists()
    other = f"sqlite:///{table.parent}/y.db"
    refused(
        lambda: Study.create(there.path, study.parts, study.tasks, study.meta, other), "x.db, and --storage would hide"
    )


def test_a_study_that_cannot_be_begun_leaves_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    refused(lambda: Study.create(out, planted.parts(), ["a"], {}, "nonsense://host/db"), "cannot open the storage")
    assert not list(tmp_path.iterdir())


# -- answers --------------------------------------------------------------------------------------------------------


def frame(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], Any]:
    return lambda file: change(pd.read_parquet(file)).to_parquet(file, index=False)


def flip(file: Path) -> None:
    """One bit of the scores."""
    about = pq.ParquetFile(file).metadata.row_group(0).column(examples.COLUMNS.index("score"))
    content = bytearray(file.read_bytes())
    begin = about.dictionary_page_offset or about.data_page_offset  # the pages of a column end with their values
    content[begin + about.total_compressed_size - 2] ^= 4
    file.write_bytes(content)


ANSWERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda file: file.write_bytes(b""), "cannot be read as Parquet"),
    "half": (lambda file: file.write_bytes(file.read_bytes()[:400]), "cannot be read as Parquet"),
    "one bit": (flip, "cannot be read as Parquet"),
    "text": (lambda file: file.write_text("hello"), "cannot be read as Parquet"),
    "another's end": (lambda file: file.write_bytes(b"PAR1" + bytes(99) + b"PAR1"), "cannot be read as Parquet"),
    "no score": (frame(lambda rows: rows.drop(columns="score")), "no column 'score'"),
    "no answer": (frame(lambda rows: rows.drop(columns="answer")), "no column 'answer'"),
    "no rows": (frame(lambda rows: rows.head(0)), "no rows"),
    "a score in words": (frame(lambda rows: rows.assign(score="high")), "a score is not a number"),
    "a score of NaN": (frame(lambda rows: rows.assign(score=math.nan)), "a score is not a number"),
    "a score of infinity": (frame(lambda rows: rows.assign(score=math.inf)), "a score is not a number"),
    "an example twice": (frame(lambda rows: pd.concat([rows, rows])), "holds an example twice"),
    "tasks of numbers": (frame(lambda rows: rows.assign(task=5)), "which task or which image"),
    "no images": (frame(lambda rows: rows.assign(cluster=None)), "which task or which image"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "no such file"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_damaged_answers_are_one_plan_to_be_run_again_said_once(answered: Path, name: str) -> None:
    change, words = ANSWERS[name]
    study = Study(answered)
    before = study.table().set_index("key")
    plan = study.measured()[3].plan
    change(answered / "examples" / f"{plan.key}.parquet")
    found = Study(answered)
    with pytest.warns(Notice) as reading:
        assert [found.examples(plan) for _ in range(3)] == [None] * 3
    assert len(reading) == 1, "said once"
    assert words in str(reading[0].message)
    assert "runs that plan again" in str(reading[0].message)
    if (answered / "examples" / f"{plan.key}.parquet").is_dir():
        (answered / "examples" / f"{plan.key}.parquet").rmdir()
    again = Study(answered)
    with pytest.warns(Notice, match="that plan is run again"):
        assert again.enqueue([study.native, plan]) == 1
    assert len(again.measured()) == len(before) - 1
    assert run(again) == [plan]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = Study(answered)
        assert whole.enqueue([study.native, plan]) == 0
        after = whole.table().set_index("key")
    columns = [name for name in before if name not in ("number", "seconds")]
    pd.testing.assert_frame_equal(after.loc[before.index, columns], before[columns])


def test_queueing_reads_answers_once_and_again_where_they_changed(
    answered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, read, files = Study(answered), examples.read, list[Path]()
    monkeypatch.setattr(examples, "read", lambda file: (files.append(file), read(file))[1])
    plans = [trial.plan for trial in study.measured()]
    for plan in plans:  # as a search does, which draws one plan after the other
        assert study.enqueue([plan]) == 0
    assert len(files) == len(set(files)) == len(plans)
    flip(files[0])
    with pytest.warns(Notice, match="that plan is run again"):
        assert study.enqueue(plans) == 1
    assert files[len(plans) :] == files[:1]


def test_answers_damaged_half_way_are_begun_anew(answered: Path) -> None:
    study = Study(answered)
    plan = planted.plan(planted.PARTS, [3, 3, 3])
    study.enqueue([plan])
    asked = study.ask()
    assert asked is not None
    study.tell(asked, answers(plan, 4), {"seconds": 1.0}, done=2)
    (answered / "examples" / f"{plan.key}.parquet").write_bytes(b"")
    asked = study.ask()
    assert asked is not None
    refused(lambda: study.tell(asked, answers(plan), {"seconds": 1.0}), "the same command runs that plan again")
    study.requeue(asked)
    with pytest.warns(Notice, match="run again"):
        assert study.enqueue([plan]) == 1
    assert run(study) == [plan]
    rows = study.examples(plan)
    assert rows is not None
    assert len(rows) == 8


def test_two_versions_are_not_mixed_in_silence(answered: Path) -> None:
    study = Study(answered)
    plan = planted.plan(planted.PARTS, [3, 3, 3])
    study.enqueue([plan])
    asked = study.ask()
    assert asked is not None
    study.tell(asked, answers(plan), {"seconds": 1.0, "versions": {"sensitivity": "0.2.0"}})
    assert any("different versions (sensitivity 0.1.0 and 0.2.0)" in note for note in observations_of(study).notes)


# -- kept rankings --------------------------------------------------------------------------------------------------

KEPT: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[:300]),
    "another share": lambda file: file.write_text(file.read_text().replace('"consensus": ', '"consensus": 9', 1)),
    "of another shape": lambda file: file.write_text('{"components": 5}'),
    "a list": lambda file: file.write_text("[]"),
    "as it was kept before": lambda file: file.write_bytes(file.read_bytes().split(b"\n", 1)[1]),
    "bytes": lambda file: file.write_bytes(bytes(range(256))),
}


@pytest.fixture(scope="module")
def ranked(made: Path) -> Path:
    """The file of a ranking that was kept."""
    folder = Path(shutil.copytree(made / "table", made / "ranked"))
    rank(Study(folder), bootstraps=0, thorough=False)
    return next((folder / "rankings").iterdir())


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_ranking_that_was_changed_counts_for_nothing(ranked: Path, name: str, tmp_path: Path) -> None:
    copied = Path(shutil.copyfile(ranked, tmp_path / ranked.name))
    assert kept_rankings.read(copied) is not None
    KEPT[name](copied)
    assert copied.read_bytes() != ranked.read_bytes()
    assert kept_rankings.read(copied) is None


def test_a_kept_ranking_that_was_changed_is_made_again(ranked: Path) -> None:
    study, content = Study(ranked.parents[1]), ranked.read_bytes()
    kept = rank(study, bootstraps=0, thorough=False)
    KEPT["another share"](ranked)
    found = rank(study, bootstraps=0, thorough=False)
    pd.testing.assert_frame_equal(found.table, kept.table)
    assert ranked.read_bytes() == content


def test_the_key_of_a_kept_ranking_covers_all_code_and_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    kept_rankings._code.cache_clear()
    plain = kept_rankings._code()
    changes = (
        "study/scores.py",
        "study/study.py",
        "analysis/surrogate/surrogate.py",
        "analysis/importance/estimators.py",
        "spec/components.py",
    )
    for changed in changes:
        assert (PACKAGE / changed).is_file()
        read = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda f, c=changed, r=read: r(f) + b"#" * (f == PACKAGE / c))
        kept_rankings._code.cache_clear()
        assert kept_rankings._code() != plain, changed
        monkeypatch.undo()
    monkeypatch.setattr(kept_rankings, "version", lambda name: "0")
    kept_rankings._code.cache_clear()
    assert kept_rankings._code() != plain
    monkeypatch.undo()
    kept_rankings._code.cache_clear()
    assert kept_rankings._code() == plain


# -- exports --------------------------------------------------------------------------------------------------------


def export(folder: Path) -> Path:
    """A manifest as an export writes it, without the weights."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    components = planted.parts()
    plan = planted.plan(planted.PARTS, [4, 8, 4])
    weighs = {"bytes": 9, "bpw": 4.0, "bpw_codes": 4.0}
    facts = {
        "version": 1, "model": "planted", "by": "linear", "key": plan.key, "plan": plan.to_json(), "size": weighs,
        "weights": {c.name: [w.name for w in c.weights] for c in components.components}, "format": "gptq",
        "predicted_size": weighs, "written": {"bytes": 9, "bpw": 4.0, "components": {"vision": 9}, "headers": 1},
        "trial": {"path": "fast", "meta": {"tasks": ["vqa"], "n": 4, "seed": 0, "data": {"vqa": "4 examples"}}},
        "dtype": "float32", "runtime": "gptq", "runs": False,
    }  # fmt: skip
    manifest.write(folder, facts, {})
    return folder


MANIFESTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no files": (drop("files"), "'files' is missing"),
    "files as a list": (put("files", []), "'files' is []"),
    "a file of null": (put("files/config.json", None), "'files.config.json' is null"),
    "a file of -1 bytes": (put("files/config.json/bytes", -1), "bytes' is -1"),
    "a hash of 5": (put("files/config.json/sha256", 5), "sha256' is 5"),
    "a short hash": (put("files/config.json/sha256", "abc"), "64 hexadecimal digits"),
    "a file elsewhere": (
        lambda d: d["files"].update({"../../secret": {"bytes": 1, "sha256": "0" * 64}}), "which lies elsewhere",
    ),
    "a file at the root": (
        lambda d: d["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}), "which lies elsewhere",
    ),
    "no key": (drop("key"), "'key' is missing"),
    "no trial": (drop("trial"), "'trial' is missing"),
    "a trial in words": (put("trial", "none"), "'trial' is \"none\""),
    "meta of 5": (put("trial/meta", 5), "'trial.meta' is 5"),
    "n in words": (put("trial/meta/n", "all"), "'trial.meta.n' is \"all\""),
    "versions in words": (put("trial/versions", "new"), "'trial.versions' is \"new\""),
    "a dtype of ours": (put("dtype", "float5"), "'dtype' is \"float5\""),
    "runs of 1": (put("runs", 1), "'runs' is 1"),
    "no format": (put("format", None), "'format' is null"),
    "a plan of 5": (put("plan", 5), "'plan' is 5"),
    "bytes in words": (put("written/bytes", "many"), "'written.bytes' is \"many\""),
    "a gain in words": (put("trial/path_gain", "some"), "'trial.path_gain' is \"some\""),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = MANIFESTS[name]
    folder = export(tmp_path / "export")
    edit(folder / manifest.MANIFEST, change)
    assert cli.main(["verify", str(folder)]) == 2
    told = capsys.readouterr().err
    assert words in told
    sentence(UserError(told.removeprefix("error: ").rstrip("\n")))


def test_an_export_as_it_was_written_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(export(tmp_path / "export"))]) == 0
    assert "every file is as it was written" in capsys.readouterr().out


NOTES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "bpw in words": (put("bpw", "four"), "'bpw' is \"four\""),
    "no folder": (drop("folder"), "'folder' is missing"),
    "a folder of 5": (put("folder", 5), "'folder' is 5"),
    "bytes below none": (put("bytes", -9), "'bytes' is -9"),
    "a gain of 5": (put("path_gain", 5), "'path_gain' is 5"),
    "a gain without its path": (put("path_gain", {}), "'path_gain.path' is missing"),
    "a task's gain in words": (put("path_gain/vqa", "much"), "'path_gain.vqa' is \"much\""),
    "a time of null": (put("time", None), "'time' is null"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTES)
def test_notes_of_exports(table: Path, name: str) -> None:
    change, words = NOTES[name]
    edit(next((table / "exports").glob("*.json")), change)
    refused(lambda: exports.notes_of(table), words)


def test_a_file_beside_the_notes_of_exports_is_no_note(table: Path) -> None:
    before = exports.notes_of(table)
    (table / "exports" / "mine.json").write_text("[]")
    assert exports.notes_of(table) == before


@pytest.mark.parametrize("content", ["", "[]", '{"verdict": 5}', '{"verdict": "fine"}', "null"])
def test_verdicts_that_are_none(table: Path, content: str) -> None:
    folder = export(table.parent / "export")
    note = {"format": "gptq", "plan": "all 4", "bpw": 4.0, "bytes": 9, "written": True}
    exports.write_note(table, folder, note)
    (folder / manifest.VERIFIED).write_text(content)
    refused(lambda: exports.notes_of(table), "writes it anew")


def test_cells_are_no_formulas() -> None:
    rows = pd.DataFrame({"=a": ["=1+1", "@x", "+1", "-2", "plain", "\t=2"], "b": [-1.5, 2, 3, 4, 5, 6]})
    text = csv_bytes(rows).decode()
    assert text.splitlines()[0] == "'=a,b"
    assert "'=1+1,-1.5" in text  # numbers stay numbers
    cells = [line.split(",")[0].strip('"') for line in text.splitlines()]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t"))]


@pytest.mark.parametrize(
    "hostile", ["<img src=x onerror=alert(1)>", '"; evil: true', "a: b", "yes", "[x](http://y)", "`x`"]
)
def test_the_card_of_an_export_says_names_and_means_nothing_by_them(hostile: str) -> None:
    from types import SimpleNamespace

    import yaml

    from sensitivity.formats.writing.job import Written
    from sensitivity.formats.writing.model_card import card

    components = ComponentMap(hostile, "linear", planted.parts().weights, (Kept("x", 10, hostile),))
    plan = planted.plan(planted.PARTS, [4, 8, 4])
    source = SimpleNamespace(license=hostile)
    job: Any = SimpleNamespace(source=source, parts=components, plan=plan, stored_as=lambda format: format)
    score = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    counts = {"n": 9, "to_wrong": 2, "to_right": 0, "empty": 0, "cut": None, "malformed": 0}
    answers = [{"task": hostile, "kind": kind, **counts} for kind in (None, hostile, "other")]
    meta = {"tasks": [hostile], "n": 9, "seed": 0, "data": {hostile: hostile}}
    facts: Any = {"scores": {hostile: score}, "note": hostile, "answers": answers, "meta": meta}
    text = card(job, Written(load="load()"), "plan", facts | {"versions": {hostile: hostile}})
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"license": hostile, "base_model": Path(hostile).name}
    below = text.split("---\n", 2)[2]
    assert "<" not in below
    assert "](" not in below
    if hostile == "`x`":
        assert "`x`" not in below


# -- every value of our own files, replaced by each of a few odd ones -------------------------------------------------

ODD: tuple[Any, ...] = (None, True, -1, 0, 2.5, 10**30, "", "<b>", [], {}, [None], {"a": None})


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of a JSON document, where each value stands; of long lists, the first two."""
    yield at
    if isinstance(value, dict):
        for name, item in value.items():
            yield from places(item, (*at, name))
    elif isinstance(value, list):
        for i, item in enumerate(value[:2]):
            yield from places(item, (*at, i))


def mutated(document: Any) -> Iterator[Any]:
    for at in places(document):
        for odd in ODD:
            if not at:
                yield odd
                continue
            found = copy.deepcopy(document)
            inside = found
            for word in at[:-1]:
                inside = inside[word]
            inside[at[-1]] = odd
            yield found
        if at and isinstance(at[-1], str):
            found = copy.deepcopy(document)
            inside = found
            for word in at[:-1]:
                inside = inside[word]
            del inside[at[-1]]
            yield found


@pytest.fixture(scope="module")
def documents(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    study = Study(made / "swept")
    attrs = study.optuna_study.user_attrs
    folder = export(tmp_path_factory.mktemp("export") / "export")
    outcome = {"time": "now", "key": "0" * 16, "verdict": "whole", "words": "fine"}
    add_to_atlas(study, folder.parent / "atlas.parquet")
    table = pq.read_table(folder.parent / "atlas.parquet")
    scheme = {"method": "rtn", "bits": 4, "group": "row", "symmetric": True}
    values = [{"component": "vision", "scheme": scheme, "score": 0.5}]
    return {
        "atlas": atlas_file._checked(table.schema.metadata[atlas_file.KEY], table.to_pylist(), "it"),
        "attributions": {"title": "attributions", "version": 1, "scores": {"gram": {"values": values}}},
        "plan": json.loads((made / "table" / "plan.json").read_bytes()),
        "manifest": json.loads((folder / manifest.MANIFEST).read_bytes()),
        "export": json.loads(next((made / "table" / "exports").glob("*.json")).read_bytes()),
        "verified": outcome,
        "study": {name: attrs[name] for name in ("meta", "tasks", "parts")},
        "trial": study.optuna_study.get_trials()[study.measured()[1].number].user_attrs,
    }


@pytest.mark.parametrize("name", ["plan", "manifest", "export", "verified", "study", "trial", "atlas", "attributions"])
def test_the_reader_agrees_with_a_full_reader_of_schemas(documents: dict[str, Any], name: str) -> None:
    """Our few lines know a part of JSON Schema; the library knows all of it."""
    files = [(file.name, Resource.from_contents(json.loads(file.read_bytes()))) for file in schema.FOLDER.iterdir()]
    full = jsonschema.Draft202012Validator(schema.schema_of(name), registry=Registry().with_resources(files))
    assert schema.fault(documents[name], schema.schema_of(name), name) is None
    wrong = right = 0
    for document in mutated(documents[name]):
        found = schema.fault(document, schema.schema_of(name), name)
        whole = not any(isinstance(value, bool) for value in (document,)) and full.is_valid(document)
        assert (found is None) == whole, (found, document)
        wrong, right = wrong + (not whole), right + whole
        if found is not None:
            sentence(UserError(f"{name}.json cannot be used: {found}"))
    assert wrong > 20
    assert right or name == "verified"


def test_every_value_of_a_recommendation_replaced(table: Path, documents: dict[str, Any]) -> None:
    """What passes the schema is a recommendation that can be told in words, or says in a sentence why not."""
    study, told = Study(table), 0
    for document in mutated(documents["plan"]):
        if schema.fault(document, schema.schema_of("plan"), "plan") is not None:
            continue
        (table / "plan.json").write_text(json.dumps(document))
        try:
            for one in recommended(study):
                assert one.to_json()["describe"]
                assert one.predicted.score is not None
            told += 1
        except UserError as error:
            sentence(error)
    assert told


# -- full precision that scored nothing -------------------------------------------------------------------------------


def test_a_task_that_is_never_answered_has_nothing_to_lose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.vstack([planted.grid((2, 8)), [[16.0] * 3]])
    formulas = {"vqa": planted.product, "silent": lambda bits: np.zeros(len(bits))}
    study = planted.study(tmp_path / "run", formulas, rows=rows)
    for words in (
        "--task silent",
        "--weight vqa=1 --weight silent=1",
        "--floor silent=0.9",
        "--task silent --runtime fake",
    ):
        assert cli.main(["recommend", str(study.path), "--bpw", "5", *words.split()]) == 2
        told = capsys.readouterr().err
        assert "full precision scored 0 on 'silent', so there is nothing to lose" in told
        assert "its prompts and answers" in told
    refused(
        lambda: export_from(planted_alone(tmp_path / "alone"), 5.0, tmp_path / "x.json", "plan", False),
        "nothing to lose",
    )
    assert (
        cli.main(["recommend", str(study.path), "--bpw", "5", "--task", "vqa"]) == 0
    )  # the other task has what to lose


def planted_alone(path: Path) -> Path:
    rows = np.vstack([planted.grid((2, 8)), [[16.0] * 3]])
    return planted.study(path, {"silent": lambda bits: np.zeros(len(bits))}, rows=rows).path


def test_scores_below_zero_have_no_shares(tmp_path: Path) -> None:
    rows = np.vstack([planted.grid((2, 8)), [[16.0] * 3]])
    study = planted.study(tmp_path, {"loss": lambda bits: planted.product(bits) - 2}, rows=rows)
    refused(lambda: Knapsack.of(study, ["loss"]), "share of it, which must be above 0")


# -- a full disk, and an import that is stopped -----------------------------------------------------------------------

LIMITED = """
import resource, signal, sys, warnings
sys.path.insert(0, {tests!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from sensitivity.cli import main as cli
import sensitivity.study.importing.imported_study
{before}
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
{code}
"""


def limited(room: int, code: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Code in a process of its own, in which no file can grow beyond so many bytes."""
    text = LIMITED.format(tests=str(Path(__file__).parents[1]), room=room, code=code, before=before)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)


@pytest.mark.parametrize("room", few([0, 300, 3000, 9000], [300]))
def test_an_import_onto_a_full_disk_leaves_nothing(tmp_path: Path, room: int) -> None:
    (tmp_path / "table.csv").write_text(GOOD)
    line = ["import", str(tmp_path / "table.csv"), *PARTS, *SCORE, "--out", str(tmp_path / "run")]
    done = limited(room, f"raise SystemExit(cli.main({line!r}))")
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: no space is left for"), done.stderr
    sentence(UserError(done.stderr.removeprefix("error: ").rstrip("\n")))
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]
    assert cli.main(line) == 0


def test_a_journal_on_a_full_disk_keeps_whole_lines_and_goes_on(table: Path) -> None:
    """The process that met the full disk dies; what it had half-written is gone, and the next one goes on."""
    before = (table / "journal.log").read_bytes()
    code = "study.append([planted.plan(planted.PARTS, [3, 3, 3])] * 3, [{'vqa': 0.5}] * 3)"
    opened = f"import planted; from sensitivity.study.study import Study; study = Study({str(table)!r})"
    done = limited(len(before) + 1000, code, opened)
    assert "no space is left for" in done.stderr
    content = (table / "journal.log").read_bytes()
    assert content.startswith(before)
    assert content.endswith(b"\n")
    study = Study(table)
    assert len(study.trials()) == 28
    study.append([planted.plan(planted.PARTS, [3, 3, 3])], [{"vqa": 0.5}])
    assert len(Study(table).trials()) == 29


def test_a_folder_on_a_full_disk_of_its_own(tmp_path: Path) -> None:
    """A real one, where this machine lets us mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        (tmp_path / "table.csv").write_text(GOOD * 1)
        (disk / "ballast").write_bytes(bytes(52 * 1024))
        from sensitivity.study.importing.imported_study import import_table

        columns = {"v": "vision", "c": "connector", "l": "language"}
        refused(
            lambda: import_table(tmp_path / "table.csv", disk / "run", ["cider"], parts=columns), "no space is left for"
        )
        assert [file.name for file in disk.iterdir()] == ["ballast"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("after", few([0, 1, 3], [1]))
def test_an_import_that_is_killed_leaves_no_study_and_the_next_one_works(tmp_path: Path, after: int) -> None:
    """Killed while rows are added; rank accepted such a part of a table before, and a second import refused it."""
    (tmp_path / "table.csv").write_text(GOOD)
    line = ["import", str(tmp_path / "table.csv"), *PARTS, *SCORE, "--out", str(tmp_path / "run")]
    code = f"""
import os, sensitivity.study.storage.journal as s
append, count = s.Journal.append_logs, [0]
def dying(self, logs):
    count[0] += any(log["op_code"] == 4 for log in logs)
    if count[0] > {after}:
        os.kill(os.getpid(), 9)
    append(self, logs)
s.Journal.append_logs = dying
cli.main({line!r})
"""
    assert limited(10**9, code).returncode == -9
    assert not (tmp_path / "run").exists()
    refused(lambda: Study(tmp_path / "run"), "no study at")
    assert cli.main(line) == 0
    assert len(Study(tmp_path / "run").trials()) == 18


def test_there_are_cases_enough() -> None:
    tables = (TABLES, PLANS, FILES, RECOMMENDED, STUDIES, JOURNALS, ADDRESSES, ANSWERS, KEPT, MANIFESTS, NOTES)
    assert sum(map(len, tables)) >= 140


def test_too_little_memory_for_answers_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged answers are run again; those that did not fit into memory are not thrown away."""

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError("malloc of size 64 failed")

    (tmp_path / "plan.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(pd, "read_parquet", no_memory)
    with pytest.raises(MemoryError, match="malloc of size 64"):
        examples.read(tmp_path / "plan.parquet")
