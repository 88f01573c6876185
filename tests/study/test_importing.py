"""Tables that become studies: both forms, replicates, sizes, and every kind of bad row or column."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest
from scipy.special import stdtrit

from sensitivity import inspect, load, size
from sensitivity.analysis.allocate.budget import solve
from sensitivity.analysis.importance.ranking import rank
from sensitivity.analysis.reporting.page import report
from sensitivity.api.exporting import export_from
from sensitivity.cli import main as cli
from sensitivity.formats.writing.manifest import read
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import hidden_folder
from sensitivity.spec.plan import Plan
from sensitivity.study.importing.columns import Switches
from sensitivity.study.importing.imported_study import import_table
from sensitivity.study.sharing.tidy import trials
from sensitivity.study.study import Study

pytestmark = pytest.mark.usefixtures("few_trees")
COLUMNS = {"v": "vision", "c": "connector", "l": "language"}


def table() -> pd.DataFrame:
    bits = planted.grid((2, 3, 4, 8, 16))
    return pd.DataFrame(bits.astype(int), columns=list(COLUMNS)).assign(cider=planted.product(bits), meteor=0.3)


def write(tmp_path: Path, frame: pd.DataFrame) -> Path:
    frame.to_csv(tmp_path / "table.csv", index=False)
    return tmp_path / "table.csv"


def test_a_table_becomes_a_study(tmp_path: Path) -> None:
    frame = pd.concat([table(), table().head(10)])  # ten replicates
    numel = {"vision": 1000, "connector": 100, "language": 2500}
    found = import_table(
        write(tmp_path, frame), tmp_path / "run", ["cider", "meteor"], parts=COLUMNS, numel=numel, total=4000
    )
    assert (found.rows, found.used) == (135, 135)
    assert "10 rows with the bits of an earlier one: a plan's score is the mean of its rows" in found.notes
    study = Study(tmp_path / "run")
    assert len(study.trials()) == 135
    read, frame = study.table(), table()
    np.testing.assert_allclose(read["cider"], frame["cider"])
    assert read["cider.repetitions"].tolist()[:10] == [2] * 10
    assert read["cider.repetitions"][10:].isna().all()
    assert "cider.low" not in read or read["cider.low"].isna().all()  # copies of a row say nothing about its noise
    np.testing.assert_array_equal(read[["vision", "connector", "language"]], frame[["v", "c", "l"]])
    expected = (1000 * frame["v"] + 100 * frame["c"] + 2500 * frame["l"] + 400 * 16) / 4000
    np.testing.assert_allclose(read["bpw"], expected)
    assert study.parts.by == "part"
    assert rank(study, bootstraps=2).order[-1] == "connector"
    assert solve(study, bpw=5)[0].size.bpw <= 5


def test_the_score_of_a_plan_is_the_mean_of_its_rows_wherever_it_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = table()[lambda rows: rows[list(COLUMNS)].isin([2, 4, 16]).all(axis=1)]
    frame = pd.concat([few] * 5, ignore_index=True)
    frame["cider"] += 0.05 * np.random.default_rng(0).standard_normal(len(frame))
    out, numel = str(tmp_path / "run"), [f"--numel={name}=1000" for name in COLUMNS.values()]
    line = ["import", str(write(tmp_path, frame)), "--score", "cider", "--out", out, *numel]
    assert cli.main([*line, *(f"--part={column}={name}" for column, name in COLUMNS.items())]) == 0
    told = capsys.readouterr().out
    means = frame.groupby(list(COLUMNS))["cider"].agg(["mean", "sem"])
    best = [tuple(map(int, frame.loc[i, list(COLUMNS)])) for i in _frontier(means["mean"], frame)]
    half = means["sem"] * stdtrit(4, 0.975)

    assert cli.main(["watch", out, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["done"] == len(means)
    assert len(shown["frontier"]) == len(best)
    for point, bits in zip(shown["frontier"], best, strict=True):
        score = point["scores"]["cider"]
        assert score["mean"] == pytest.approx(means["mean"][bits])
        assert (score["low"], score["high"]) == pytest.approx((score["mean"] - half[bits], score["mean"] + half[bits]))
        assert (score["n"], score["repetitions"]) == (None, 5)
    page = report(Study(Path(out)), tmp_path / "report").read_text()
    for bits in best:
        cell = f"{means['mean'][bits]:.3f} [{means['mean'][bits] - half[bits]:.3f}, "
        assert cell in told
        assert re.search(rf"{re.escape(cell.strip())}&nbsp;[\d.]+\] \(mean of 5\)", page)
    assert told.count("(mean of 5)") == len(best)
    assert f"{len(frame)} trials" in page

    assert cli.main(["recommend", out, "--bpw", "4"]) == 0
    told = capsys.readouterr().out
    plan = json.loads(Path(out, "plan.json").read_text())["plan"]
    mean = means["mean"][tuple(plan[name]["bits"] if plan[name] else 16 for name in COLUMNS.values())]
    assert re.search(rf"measured cider {mean:.3f} \[[\d., ]+\] \(mean of 5\)\.", told)
    card = Path(out, "plan.md").read_text()
    assert re.search(rf"\| cider \| {mean:.4f} \| .* \| 5 repetitions \|", card)
    assert "kept (" not in card  # a table without --total says of no weight that it is kept
    written = trials(Study(Path(out)))
    assert sorted(written["score"]) == pytest.approx(sorted(means["mean"]))
    assert set(written["repetitions"]) == {5}
    last = Study(Path(out)).trials()[-1]  # a repetition of a plan
    assert Study(Path(out)).plan_named(str(last.number)) == last.plan


def _frontier(means: pd.Series, frame: pd.DataFrame) -> list[int]:
    """The first rows of the plans that no plan of at most their size beats, by brute force."""
    first = frame.drop_duplicates(list(COLUMNS)).index
    plans = [(i, sum(frame.loc[i, list(COLUMNS)]), means[tuple(frame.loc[i, list(COLUMNS)])]) for i in first]
    kept = [one for one in plans if not any(o is not one and o[1] <= one[1] and o[2] >= one[2] for o in plans)]
    return [i for i, *_ in sorted(kept, key=lambda one: one[1])]


def test_the_form_with_switches(tmp_path: Path) -> None:
    frame = pd.DataFrame({
        "bits": [4, 4, 8, 16], "type": ["MLP", "BOTH", "ATT", "MLP"], "first": [1, 0, 1, 1], "last": [0, 1, 1, 0],
        "score": [0.1, 0.2, 0.3, 0.4],
    })  # fmt: skip
    kinds = {"MLP": ["ff"], "ATT": ["attn"], "BOTH": ["attn", "ff"]}
    switches = Switches({"first": "vision.front", "last": "vision.end"}, "bits", "type", kinds)
    found = import_table(write(tmp_path, frame), tmp_path / "run", ["score"], switches=switches, numel={"vision": 10})
    read = found.study.table().set_index("score")
    assert found.study.parts.by == "group.kind"
    assert [c.numel for c in found.study.parts.components] == [3, 3, 2, 2]
    columns = ["vision.front.attn", "vision.front.ff", "vision.end.attn", "vision.end.ff"]
    assert read.loc[0.1, columns].tolist() == [16, 4, 16, 16]
    assert read.loc[0.2, columns].tolist() == [16, 16, 4, 4]
    assert read.loc[0.3, columns].tolist() == [8, 16, 8, 16]
    assert read.loc[0.4, columns].tolist() == [16, 16, 16, 16]
    with pytest.raises(UserError, match=r"'type' holds 'MLP'; say what it means \(--kinds MLP=attn,ff\)"):
        import_table(
            tmp_path / "table.csv", tmp_path / "b", ["score"],
            switches=Switches({"first": "vision"}, "bits", "type", {"ATT": ["attn"], "BOTH": ["attn"]}),
        )  # fmt: skip
    with pytest.raises(UserError, match="a switch is 0 or 1, and column 'bits' holds 4"):
        import_table(tmp_path / "table.csv", tmp_path / "b", ["score"], switches=Switches({"bits": "vision"}, "bits"))


def test_rows_left_out_are_counted_with_the_reason(tmp_path: Path) -> None:
    frame = table().astype(float)
    frame.loc[:2, "v"] = np.nan
    frame.loc[3:4, "cider"] = np.nan
    frame.loc[5, "cider"] = np.inf
    frame["meteor"] = 0.1
    found = import_table(write(tmp_path, frame), tmp_path / "run", ["cider"], parts=COLUMNS)
    assert found.used == 119
    assert "3 rows left out: bits are missing" in found.notes
    assert "3 rows left out: a score is missing or not finite" in found.notes
    assert any("no sizes given" in note for note in found.notes)
    assert found.study.meta["left_out"] == list(found.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.astype({"v": object}).replace({"v": {2: "two"}}),
            "column 'v' holds 'two' in row 1 .*not a number",
        ),
        (lambda t: t.assign(v=17), "vision has 17 bits in row 1; bits are whole numbers from 1 to 16"),
        (lambda t: t.assign(v=2.5), "vision has 2.5 bits in row 1"),
        (lambda t: t.assign(v=0), "vision has 0 bits"),
        (lambda t: t.assign(cider=np.nan), "no row of .* has all bits and scores"),
        (lambda t: t.head(0), "has a header but no rows"),
        (lambda t: t.rename(columns={"l": "L"}), "unknown column 'l'"),
        (lambda t: t.rename(columns={"meteor": "v"}), "two columns named 'v'"),
    ],
    ids=["text", "too wide", "half a bit", "none", "no scores", "empty", "unknown", "twice"],
)
def test_bad_tables(tmp_path: Path, change: object, message: str) -> None:
    path = write(tmp_path, change(table()))  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        import_table(path, tmp_path / "run", ["cider"], parts=COLUMNS)
    assert not (tmp_path / "run").exists()


def test_wrong_wishes(tmp_path: Path) -> None:
    path = write(tmp_path, table())
    out = tmp_path / "run"
    with pytest.raises(UserError, match="unknown column 'bleu'"):
        import_table(path, out, ["bleu"], parts=COLUMNS)
    with pytest.raises(UserError, match="say what the columns are"):
        import_table(path, out, ["cider"])
    with pytest.raises(UserError, match=r"named after its part of the model, vision, connector, language .* not 'eye'"):
        import_table(path, out, ["cider"], parts={"v": "eye"})
    with pytest.raises(UserError, match="two columns stand for 'vision'"):
        import_table(path, out, ["cider"], parts={"v": "vision", "c": "vision"})
    with pytest.raises(UserError, match="unknown component in --numel 'visoin'"):
        import_table(path, out, ["cider"], parts=COLUMNS, numel={"visoin": 10})
    with pytest.raises(UserError, match="no size given for connector, language"):
        import_table(path, out, ["cider"], parts=COLUMNS, numel={"vision": 10})
    with pytest.raises(UserError, match="the components have 3,000,000 weights, more than the whole model's 5"):
        import_table(path, out, ["cider"], parts=COLUMNS, total=5)
    with pytest.raises(UserError, match=r"cannot read .*nowhere.csv: No such file"):
        import_table(tmp_path / "nowhere.csv", out, ["cider"], parts=COLUMNS)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="is not a table with commas and a header"):
        import_table(tmp_path / "binary.csv", out, ["cider"], parts=COLUMNS)
    import_table(path, out, ["cider"], parts=COLUMNS)
    with pytest.raises(UserError, match="already holds a study with 125 trials"):
        import_table(path, out, ["cider"], parts=COLUMNS)


ROWS = "v,c,l,cider\n" + "".join(f"{v},{c},{w},{v + w}\n" for v in (2, 4, 8) for c in (4, 8) for w in (2, 4, 8))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ROWS, ["18 of 18 rows became trials"]),
        (ROWS.replace("2,4,2,", ",4,2,"), ["17 of 18 rows", "note: 1 row left out: bits are missing"]),
        (ROWS.replace("2,4,2,4", "2,4,2,nan"), ["17 of 18", "note: 1 row left out: a score is missing or not finite"]),
        (ROWS.replace("v,c", "v,v"), ["error: the table has two columns named 'v'; rename or delete one"]),
        (ROWS.replace(",8,", ",4,"), ["connector has the same bits in every row", "9 rows with the bits"]),
        ("v,c,l,cider\n4,4,4,1\n", ["1 of 1 rows", "vision has the same bits in every row"]),
        (ROWS.replace("2,4,2,4", "2,4,2,high"), ["error: column 'cider' holds 'high' in row 1, not a number"]),
        (ROWS.replace("2,4,2,4", "17,4,2,4"), ["error: vision has 17 bits in row 1; bits are whole numbers"]),
        (ROWS.replace(",", ";"), ["error:", "separates its columns by ';'; save it with commas"]),
        (ROWS.replace(",", ";").replace("2;4;2;4", "2;4;2;0,4"), ["error:", "separates its columns by ';'"]),
        (
            ROWS.replace("2,4,2,4", "2,4,2,56.8%"),
            ["error:", "holds '56.8%' in row 1, not a number; write 56.8, in percent in"],
        ),
        (
            ROWS.replace("2,4,2,4", '2,4,2,"0,568"'),
            ["error:", "holds '0,568' in row 1, not a number; write 0.568, with a d"],
        ),
        (ROWS.replace("2,4,2,4", "2,4,2,0.3"), ["18 of 18", "cider is 0.3 in some rows and 4 in others, as if frac"]),
        ("", ["error:", "is not a table with commas and a header"]),
    ],
    ids=[
        "good",
        "missing",
        "no score",
        "twice",
        "constant",
        "one",
        "text",
        "too wide",
        "semicolons",
        "semicolons and decimal commas",
        "percent",
        "decimal comma",
        "mixed",
        "empty",
    ],
)
def test_what_a_user_reads(tmp_path: Path, text: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.csv").write_text(text)
    out, refused = tmp_path / "run", words[0].startswith("error")
    line = ["import", tmp_path / "table.csv", "--score", "cider", "--out", out]
    line += [word for column, part in COLUMNS.items() for word in ("--part", f"{column}={part}")]
    assert cli.main([*map(str, line)]) == (2 if refused else 0)
    printed = capsys.readouterr()
    for some in words:
        assert some in (printed.err if refused else printed.out)
    assert out.exists() != refused


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("recommend RUN --bpw 0", "--bpw takes"),
        ("recommend RUN --bpw 1", "no plan fits 1.00 bpw"),
        ("recommend RUN --floor cider=1.5", "a share of full precision above 0 and at most 1"),
        ("recommend RUN --floor bleu=0.9", "unknown task 'bleu'; choose from cider"),
        ("recommend RUN --weight cider=0", "a weight above 0 and at most 1,000,000"),
        ("recommend RUN --task cider --weight cider=1", "either --task names the one task"),
        ("recommend RUN --allow visoin=4", "unknown component 'visoin'; choose from vision, connector, language"),
        ("recommend RUN --allow vision=5", "no measured width of vision is allowed"),
        ("recommend RUN --tie vision", "'vision' is a single component"),
        ("recommend RUN --top 0", "--top takes a whole number from 1 to 100, not '0'"),
        ("rank RUN --method gptq", "unknown method of this study 'gptq'; choose from codes"),
        ("rank RUN --near 2", "--near takes"),
        ("rank RUN --by thirds", "unknown granularity 'thirds'"),
        ("rank RUN --task bleu", "unknown task 'bleu'"),
    ],
)
def test_wishes_that_cannot_be_met(imported: Path, line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.replace("RUN", str(imported)).split()) == 2
    assert words in capsys.readouterr().err


def test_without_sizes_there_are_no_bytes_and_no_gain_for_each_of_them(imported: Path) -> None:
    study = Study(imported)
    assert study.table()["bytes"].isna().all()
    assert trials(study)["bytes"].isna().all()
    assert rank(study, bootstraps=0, thorough=False).table["gain_per_mb"].isna().all()


def test_limits_from_the_command_line(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"recommend {imported} --bpw 4,5 --allow vision=4,8 --tie vision,language --floor cider=20% --json"
    assert cli.main(line.split()) == 0
    found = json.loads(capsys.readouterr().out)["budgets"]
    assert [one["budget_bpw"] for one in found] == [4, 5]
    for one, name in zip(found, ("plan.json", "plan-5bpw.json"), strict=True):
        plan = Plan.from_json(json.loads((imported / name).read_text())["plan"]).bits()
        assert plan["vision"] == plan["language"] in (4, 8)
        assert one["path"].endswith(name)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    (folder / "table.csv").write_text(ROWS)
    import_table(folder / "table.csv", folder / "run", ["cider"], parts=COLUMNS)
    return folder / "run"


def test_constant_columns_and_one_row(tmp_path: Path) -> None:
    found = import_table(write(tmp_path, table().assign(c=4)), tmp_path / "run", ["cider"], parts=COLUMNS)
    assert "connector has the same bits in every row: nothing can be said about it" in found.notes
    one = import_table(write(tmp_path, table().head(1)), tmp_path / "one", ["cider"], parts=COLUMNS)
    with pytest.raises(UserError, match="1 usable trial"):
        rank(one.study)


def test_the_published_tables(tmp_path: Path, published: Path) -> None:
    numel = {"vision": 984_023_040, "connector": 104_988_672, "language": 2_516_582_400}
    parts = {"vit_bits": "vision", "qformer_bits": "connector", "llm_bits": "language"}
    found = import_table(
        published / "blip2_gptq_coco.csv", tmp_path / "gptq", ["cider", "meteor"], parts=parts, numel=numel,
        total=3_744_761_856,
    )  # fmt: skip
    read = found.study.table()
    assert len(read) == 448
    four = read[(read[["vision", "connector", "language"]] == 4).all(axis=1)]
    assert four["bpw"].item() == pytest.approx(4.446, abs=5e-4)  # as published
    thirds = {"FIRST": "front", "MIDDLE": "middle", "LAST": "end"}
    names = {"VIT": "vision", "QFORMER": "connector", "LLM": "language"}
    columns = {f"{a}_{b}": f"{p}.{g}" for a, p in names.items() for b, g in thirds.items()}
    kinds = {"MLP": ["ff"], "ATTENTION": ["attn"], "BOTH": ["attn", "ff"]}
    switches = Switches(columns, "bit_size", "type", kinds)
    found = import_table(
        published / "blip2_uniform_coco.csv", tmp_path / "uniform", ["CIDEr"], switches=switches, numel=numel,
        total=3_744_761_856,
    )  # fmt: skip
    assert found.used == 1500
    assert len(found.study.parts.names) == 18


def test_a_table_without_sizes_makes_up_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = import_table(write(tmp_path, table()), tmp_path / "run", ["cider"], parts=COLUMNS, method="rtn").study
    in_bytes = re.compile(r"\d (bytes|[kMG]B)\b")
    assert cli.main(["recommend", str(study.path), "--bpw", "4"]) == 0
    told = capsys.readouterr().out
    assert "bpw as the mean width of the parts, whose sizes are not known" in told
    assert not in_bytes.search(told + (study.path / "plan.md").read_text())
    page = re.sub(r"<(svg|script|style).*?</\1>", "", report(study, tmp_path / "r").read_text(), flags=re.S)
    assert not in_bytes.search(page)
    assert "1,000,000" not in page
    assert cli.main(["recommend", str(study.path), "--bpw", "1"]) == 2
    assert (
        "no plan fits 1.00 bpw: with the measured widths, 2.00 to 16.00 bpw can be reached" in capsys.readouterr().err
    )
    assert cli.main(["recommend", str(study.path), "--gb", "1"]) == 2
    assert "needs the sizes of the parts" in capsys.readouterr().err
    assert not Study(study.path).parts.sized
    for runtime, budget in (("gptq", 4), ("awq", 5), ("gguf", 4)):  # rules on shapes wait for the model's
        assert cli.main(["legalize", str(study.path), "--bpw", str(budget), "--runtime", runtime]) == 0
        told = capsys.readouterr().out
        assert "all rtn:4" in told
        assert "4.000 bpw as the mean width of the parts, whose sizes are not known" in told
        assert not in_bytes.search(told)
    assert cli.main(["legalize", str(study.path / "plan.json"), "--bpw", "3", "--runtime", "gptq", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cost"].endswith(
        " (predicted), 3.000 bpw instead of 4.000 as the mean width of the parts, whose sizes are not known"
    )
    assert "bytes" not in found["size"]
    model = ["--format", "gptq", "--model", "embedded:scenes-llava", "--out", str(tmp_path / "out")]
    assert cli.main(["export", str(study.path), "--bpw", "4", *model]) == 0
    assert "chosen for 4 bpw as the mean width of the parts, whose sizes" in capsys.readouterr().err
    known = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert known["written"]["bytes"] == known["predicted_size"]["bytes"] > 0


@pytest.mark.parametrize("numel", [{}, dict.fromkeys(COLUMNS.values(), 10_000)])
@pytest.mark.parametrize("method", ["awq", "smooth"])
def test_a_table_counts_codes_alone(tmp_path: Path, method: str, numel: dict[str, int]) -> None:
    """Scales are counted by rows and columns, which a table does not give."""
    frame = table()[lambda rows: rows[list(COLUMNS)].isin([4, 16]).all(axis=1)]
    made = import_table(
        write(tmp_path, frame), tmp_path / "run", ["cider"], parts=COLUMNS, numel=numel, method=method
    ).study
    widths = made.table()
    np.testing.assert_allclose(widths["bpw"], widths[list(COLUMNS.values())].mean(axis=1))
    assert Study(made.path).parts == made.parts


def test_few_weights_are_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numel = dict.fromkeys(COLUMNS.values(), 100)
    study = import_table(write(tmp_path, table()), tmp_path / "run", ["cider"], parts=COLUMNS, numel=numel).study
    assert cli.main(["recommend", str(study.path), "--bpw", "4"]) == 0
    assert "Best plan for 4 bits per weight (150 bytes), judged by cider" in capsys.readouterr().out


def test_an_export_of_an_imported_table_asks_for_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame, out = write(tmp_path, table()), tmp_path / "out"
    study = import_table(frame, tmp_path / "run", ["cider"], parts=COLUMNS, method="rtn").study
    line = ["export", str(study.path), "--bpw", "4", "--out", str(out)]
    assert cli.main([*line, "--format", "fake"]) == 2
    assert "and holds no weights: name the model that the table is about, --model MODEL" in capsys.readouterr().err
    assert cli.main(line) == 2
    told = capsys.readouterr().err
    assert "To write the plan alone, name a file: --out plan.json. To write weights, name a --format other" in told
    model = ["--format", "fake", "--model", "embedded:scenes-llava"]
    assert cli.main([*line, *model]) == 0
    known = json.loads((out / "sensitivity.json").read_text())
    plan = solve(study, bpw=4)[0].plan
    assert (known["model"], Plan.from_json(known["plan"])) == ("embedded:scenes-llava", plan)
    assert "recommend" not in capsys.readouterr().err  # which has no model to run
    # by no method that there is, or one that a table does not tell the data of
    for method, words in (("codes", "'codes' is no method"), ("gptq", "'gptq' needs calibration data")):
        other = import_table(frame, tmp_path / method, ["cider"], parts=COLUMNS, method=method).study
        assert cli.main(["export", str(other.path), *line[2:], "--force", *model]) == 2
        assert words in capsys.readouterr().err
        assert cli.main(["export", str(other.path), *line[2:], "--force", *model[:2]]) == 2
        told = capsys.readouterr().err
        assert f"--model MODEL; and {words}" in told  # both at once
    assert cli.main(["legalize", str(tmp_path / "codes"), "--bpw", "4", "--runtime", "openvino"]) == 2
    assert "`sensitivity sweep MODEL --by part" in capsys.readouterr().err  # and not the table's name


@pytest.mark.filterwarnings("ignore::sensitivity.spec.errors.Notice")  # which plan was chosen
def test_an_export_of_an_imported_table_keeps_to_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table has no shapes, so that scales are counted only where the model is there."""
    vlm = load("embedded:scenes-llava")
    parts = inspect(vlm, by="part")
    numel = {part.name: part.numel for part in parts.components}
    study = import_table(
        write(tmp_path, table()),
        tmp_path / "run",
        ["cider"],
        parts=COLUMNS,
        numel=numel,
        total=parts.numel,
        method="rtn",
    ).study
    best = solve(study, bpw=4.3)[0]
    assert best.size.counted == "without scales, since shapes are not known"
    exact = size(parts, best.plan, "compressed-tensors").bpw
    assert exact > best.size.bpw + 0.05
    found = export_from(study.path, exact + 1e-6, tmp_path / "whole", "compressed-tensors", False, model=vlm)
    assert read(found)["plan"] == best.plan.to_json()
    for bpw in (exact - 1e-3, 3.0):
        found = export_from(study.path, bpw, tmp_path / f"of-{bpw}", "compressed-tensors", False, model=vlm)
        assert size(parts, Plan.from_json(read(found)["plan"]), "compressed-tensors").bpw <= bpw
    least = min(study.measured(), key=lambda trial: trial.bpw)
    asked = study.size(least.plan).bpw + 1e-3  # its codes are within that, its files are not
    told = f"all that compressed-tensors files store: {least.plan.describe()} takes"
    with pytest.raises(UserError, match=rf"no plan fits .* bpw with {told}"):
        export_from(study.path, asked, tmp_path / "none", "compressed-tensors", False, model=vlm)
    assert not (tmp_path / "none").exists()
    # a plan.json was chosen by codes alone: it is what was asked for, and written with a note
    line = f"{study.path} --bpw {best.size.bpw + 0.01:g}"
    assert cli.main(f"recommend {line} --no-run".split()) == 0
    assert (
        "bits per weight without scales, since shapes are not known (codes alone"
        in (study.path / "plan.md").read_text()
    )
    words = f"export {study.path / 'plan.json'} --format fake --model embedded:scenes-llava --out {tmp_path / 'own'}"
    capsys.readouterr()
    assert cli.main(words.split()) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert f"more than the {best.size.bpw + 0.01:g} for which it was chosen: the table has no shapes" in told
    assert f"`sensitivity export {line} --format NAME --model MODEL --out DIR` keeps to it" in told


def test_what_a_killed_import_leaves_is_removed_by_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing that a running one, or somebody else, has there."""
    file, line = write(tmp_path, table()), ["--score", "cider", "--part", "v=vision"]
    code = (
        "import os, signal, sys\nfrom sensitivity.study.importing import imported_study\n"
        "imported_study.Study.append = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from sensitivity.cli.main import main\nmain(sys.argv[1:])"
    )
    words = ["import", str(file), *line, "--out", str(tmp_path / "runs" / "one")]
    assert subprocess.run([sys.executable, "-c", code, *words]).returncode == -signal.SIGKILL
    (left,) = (tmp_path / "runs").iterdir()
    assert left.name.startswith(".one.")
    foreign = tmp_path / "runs" / ".two.1.1.unfinished"
    foreign.mkdir()
    with hidden_folder(tmp_path / "runs" / "three") as running:
        assert cli.main(words) == 0
        assert {*(tmp_path / "runs").iterdir()} == {tmp_path / "runs" / "one", foreign, running}
    assert f"removed what killed processes left: {left}" in capsys.readouterr().err
