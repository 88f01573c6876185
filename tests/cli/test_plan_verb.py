"""sensitivity plan and sensitivity explain, from the command to what they store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sensitivity import UserError, inspect, load, scheme, task
from sensitivity.analysis.recommending.kept_recommendation import recommended
from sensitivity.api import explaining, exporting, plan_notices, planning
from sensitivity.cli import main as cli
from sensitivity.measure.attribution import calibrated
from sensitivity.measure.gradients.first_order import gather
from sensitivity.spec.plan import Plan
from sensitivity.study.storage import attributions
from sensitivity.study.study import Study

pytestmark = pytest.mark.usefixtures("few_trees")
MODEL = "embedded:scenes-llava"
PLAN = f"plan {MODEL} --bpw 4,3 --by part --method rtn --bits 2,3,4,8 --n 12 --calibration-n 4 --trials 6 --json"


def run(capsys: pytest.CaptureFixture[str], line: str) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert cli.main(line.split()) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    return json.loads(out), err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("plan")
        patch.setenv("SENSITIVITY_CACHE", str(place / "cache"))
        yield place


def test_a_plan_in_minutes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Few evaluations, each budget kept, verified on fresh examples, and a study like that of any sweep."""
    found, err = run(capsys, f"{PLAN} --out {folder / 'study'}")
    assert [one["budget_bpw"] for one in found["budgets"]] == [4.0, 3.0]
    for one in found["budgets"]:
        assert one["size"]["bpw"] <= one["budget_bpw"]
        assert one["fresh_examples"]
        assert one["measured"]["n"] == 12
    assert 3 <= found["plans_measured"] <= 6
    assert set(found["scores"]) == {"change", "swing", "kfac"}
    assert "the loss on calibration data is" in err  # the embedded model was trained on it
    study = Study(folder / "study")
    assert study.counts()["done"] == found["plans_measured"]
    assert any(trial.plan.is_native for trial in study.trials())
    assert len(recommended(study)) == 2
    again, _ = run(capsys, f"{PLAN} --out {folder / 'study'}")
    assert again["plans_measured"] == found["plans_measured"]
    assert [one["key"] for one in again["budgets"]] == [one["key"] for one in found["budgets"]]
    for verb in ("recommend", "export"):
        more = f" --format plan --out {folder / 'plan.json'}" if verb == "export" else " --no-run"
        run(capsys, f"{verb} {folder / 'study'} --bpw 4 --json{more}")


def test_a_budget_that_no_plan_meets_refuses_only_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{PLAN.replace('--bpw 4,3', '--bpw 1,4')} --out {folder / 'partly'}"
    for typed, key in ((f"{line} --dry-run", "plans"), (line, "budgets")):
        capsys.readouterr()
        assert cli.main(typed.split()) == 2
        out = json.loads(capsys.readouterr().out)
        assert out["error"].startswith("no plan fits 1.00 bpw")
        assert out["error"].endswith("can be reached; ask for more")
        assert out[key]
    assert [one["budget_bpw"] for one in out["budgets"]] == [4.0]
    assert [one.budget for one in recommended(Study(folder / "partly"))] == [4.0]


@pytest.mark.parametrize(("runtime", "budget", "least"), [("awq", "3", "4.42"), ("gguf", "4", "5.05")])
def test_lower_widths_are_not_advised_where_a_runtime_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runtime: str, budget: str, least: str
) -> None:
    line = f"plan {MODEL} --by part --bits 2,3,4 --n 12 --calibration-n 4 --bpw {budget} --runtime {runtime} --dry-run"
    assert cli.main([*line.split(), "--json", "--out", str(tmp_path / "run")]) == 2
    told = json.loads(capsys.readouterr().out)["error"]
    assert f"with these widths, {least} to" in told
    end = f"ask for more, or name another runtime or format: in {runtime} files, no lower widths would be small enough"
    assert told.endswith(end)


def test_fewer_examples_decide_than_verify(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is recommended later from the study is verified on as many examples as before."""
    monkeypatch.setattr(planning, "MIN_EXAMPLES", 3)
    line = PLAN.replace("--bpw 4,3", "--bpw 4").replace("--trials 6", "--trials 2 --top 1")
    found, _ = run(capsys, f"{line} --out {folder / 'few'}")
    assert Study(folder / "few").meta["n"] == 3
    sweep = f"sweep {MODEL} --by part --method rtn --bits 2,3 --n 12 --trials 2 --search frontier"
    for more in ("--dry-run", "--json"):
        assert cli.main([*sweep.split(), "--out", str(folder / "few"), more]) == 2
        told = "n: there 3, here 12; `sensitivity plan` searches on fewer examples than its --n"
        assert told in capsys.readouterr().err
    assert found["measured"]["n"] == 12
    assert found["fresh_examples"]
    again, _ = run(capsys, f"recommend {folder / 'few'} --bpw 4 --top 1 --json")
    assert again["measured"]["n"] == 12


def test_the_plan_that_was_verified_for_a_budget_is_the_one_that_is_exported(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is predicted to be best there; but not in a format that cannot hold it, or not within the budget."""
    study = folder / "exported"
    found, _ = run(capsys, f"{PLAN} --out {study}".replace("--trials 6", "--trials 2 --top 1"))
    for one in found["budgets"]:
        out = folder / f"of-{one['budget_bpw']:g}"
        assert cli.main(f"export {study} --bpw {one['budget_bpw']:g} --format fake --out {out}".split()) == 0
        told = " ".join(capsys.readouterr().err.split())
        assert f"verified for {one['budget_bpw']:g} bpw ({one['path']}): {one['describe']}; vqa " in told
        assert json.loads((out / "sensitivity.json").read_bytes())["plan"] == one["plan"]
    assert cli.main(f"export {study} --bpw 5 --format fake --out {folder / 'of-5'}".split()) == 0
    assert "chosen for 5 bpw: " in capsys.readouterr().err  # nothing was verified for that
    best = exporting.best_legal_plan(Study(study), "fake", 4.0)
    told = exporting._choice_in_words(Study(study), best, "fake")  # where the verified one would not fit
    verified = next(one["path"] for one in found["budgets"] if one["budget_bpw"] == 4)
    assert f"within which fake does not hold the plan that was verified for it ({verified}): " in told
    for name, value in (("violations", ["a rule"]), ("budget_bits", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(exporting, name, lambda *_, value=value: value)
            assert exporting._verified_plan(Study(study), 4.0, "fake") is None


def test_scores_are_kept_for_the_same_settings(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the budget; and what they say of the calibration data is said again."""
    passes: list[int] = []

    def counted(*given: Any) -> Any:
        passes.append(1)
        return gather(*given)

    monkeypatch.setattr(calibrated, "gather", counted)
    line = f"{PLAN} --out {folder / 'kept'}".replace("--trials 6", "--trials 2 --top 1")
    found, told = run(capsys, line.replace("-n 4", "-n 5"))
    computed = len(passes)
    again, retold = run(capsys, line.replace("-n 4", "-n 5"))
    assert (len(passes), again["scores"]) == (computed, found["scores"])
    easier = [line for line in told.splitlines() if "the loss on calibration data is" in line]
    assert len(easier) == 1
    assert easier[0] in retold
    assert [one["key"] for one in again["budgets"]] == [one["key"] for one in found["budgets"]]
    run(capsys, line.replace("-n 4", "-n 5").replace("4,3", "5"))
    assert len(passes) == computed > 0
    run(capsys, f"{line.replace('-n 4', '-n 5')} --cache-gb 0")
    run(capsys, line.replace("-n 4", "-n 6"))
    run(capsys, line.replace("-n 4", "-n 5").replace("2,3,4,8", "2,3,4"))
    assert len(passes) == 4 * computed


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--calibration caption --trials 2", "calibrated on caption, not on vqa, and may misjudge"),
        ("--calibration caption --trials 40", ""),
        ("--calibration vqa,caption --trials 2", ""),
        ("--trials 2", ""),
    ],
)
def test_scores_of_another_task_are_said_to_mislead(
    folder: Path, capsys: pytest.CaptureFixture[str], more: str, told: str
) -> None:
    line = f"{PLAN} --out {folder / more.replace(' ', '')}".replace("--trials 6", more)
    _, err = run(capsys, line.replace("--bpw 4,3", "--bpw 9 --top 1").replace("2,3,4,8", "8"))
    assert ("may misjudge which parts matter there" in err) == bool(told)
    assert told in err


def test_time_is_limited_and_there_is_a_plan_all_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{PLAN} --out {folder / 'short'} --minutes 0.001"
    assert cli.main(line.replace(" --json", "").split()) == 0
    assert f"\n1 plan was measured in {folder / 'short'}\n" in capsys.readouterr().out
    found, _ = run(capsys, line)
    assert found["plans_measured"] == 1  # full precision alone
    assert found["measured"]["n"] == 12
    assert found["fresh_examples"]


def test_where_scores_misjudge_all_trials_are_used_and_more_are_advised(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded to nearest at few bits, no plan keeps much: the search goes on. Where all is kept, it ends early."""
    line = f"plan {MODEL} --method rtn --bits 2,3,8 --bpw 2.6 --n 12 --calibration-n 4 --top 1 --json"
    found, err = run(capsys, f"{line} --trials 7 --out {folder / 'misjudged'}")
    assert found["plans_measured"] == 7
    assert "the 7 measured plans are believed to keep little of full precision (at most " in err
    assert "--trials 40 goes on from here" in err
    further, _ = run(capsys, f"{line} --trials 9 --out {folder / 'misjudged'}")
    assert further["plans_measured"] == 9
    monkeypatch.setattr(plan_notices, "MORE", 9)  # what was advised has run
    _, err = run(capsys, f"{line} --trials 9 --out {folder / 'misjudged'}")
    assert "`sensitivity sweep` with the same --out, --by and --n 12 goes on from here" in err
    easy = line.replace("2.6", "8.6").replace("--n 12", "--n 60")
    found, err = run(capsys, f"{easy} --trials 7 --out {folder / 'easy'}")
    assert found["plans_measured"] < 7
    assert "keep little" not in err
    lines = [line for line in map(json.loads, err.splitlines()) if "plans_done" in line]
    assert all(line["plans_left"] > 0 for line in lines if line["left"] > 0)
    assert (lines[-1]["plans_done"], lines[-1]["plans_left"]) == (found["plans_measured"], 0), "the search has ended"
    assert lines[-1]["left"] == lines[-1]["seconds_left"] == 0


def test_a_plan_without_words_opens_with_what_needs_no_gradient(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "plan embedded:scenes-blip2-itm --task retrieval --bpw 6 --by part --method rtn --bits 4,8 --n 8 --json"
    found, _ = run(capsys, f"{line} --calibration-n 4 --trials 3 --top 1 --out {folder / 'search'}")
    assert set(found["scores"]) == {"gram"}
    assert found["size"]["bpw"] <= 6


def test_a_large_model_opens_with_one_backward_pass(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`change` takes one for each group of blocks whose errors fit into memory: those of a 7B model are 34 groups."""
    monkeypatch.setattr(planning, "MOST_PASSES", 0)
    found, _ = run(capsys, f"{PLAN} --out {folder / 'large'}")
    assert set(found["scores"]) == {"swing", "kfac", "gram"}


def test_scores_of_components_and_how_well_they_foretell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"explain {MODEL} --by part --method rtn --bits 2,3,4,8 --calibration-n 4 --out {folder / 'study'}"
    found, _ = run(capsys, f"{line} --json")
    assert set(found["scores"]) == {"weight", "gram", "kfac", "swing", "fisher", "change"}
    for one in found["scores"].values():
        assert len(one["values"]) == 3 * 4
        assert one["cpu_seconds"] > 0
        assert one["passes"] > 0
        assert one["check"]["plans"] == 8
    assert json.loads((folder / "study" / "attributions.json").read_text())["title"] == "attributions"
    facts = {"model": "org/other", "fingerprint": "f", "tasks": ["vqa"], "n": 4, "seed": 0}
    Study.create(folder / "other", inspect(MODEL, by="part"), ["vqa"], facts)
    assert cli.main([*line.split()[:-1], str(folder / "other")]) == 2
    assert f"other was measured on org/other, and {MODEL} is another model" in capsys.readouterr().err
    assert not (folder / "other" / "attributions.json").exists()
    assert attributions.read(folder / "study", "gram", load(MODEL).fingerprint)
    with pytest.raises(UserError, match="is about another model than the study beside it; compute it again with"):
        attributions.read(folder / "study", "gram", "f")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "attributions.json").write_text("mine")
    assert cli.main([*line.split()[:-1], str(folder / "foreign")]) == 2
    assert "was not written by `sensitivity explain`" in capsys.readouterr().err
    assert (folder / "foreign" / "attributions.json").read_text() == "mine"


def test_where_the_damage_of_a_plan_comes_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, f"{PLAN} --out {folder / 'explained'}")  # of its own: other tests may run in another process
    study = Study(folder / "explained")
    trial = next(trial for trial in study.trials() if not trial.plan.is_native)
    found, _ = run(capsys, f"explain {folder / 'explained'} --plan {trial.key[:8]} --calibration-n 2 --json")
    assert found["key"] == trial.key
    for table in ("components", "modalities"):
        assert sum(found[table].values()) == pytest.approx(found["change"], rel=0.011)
    assert found["missing"] <= 0.0101
    assert len(found["regions"]) == found["examples"] == 2
    stored = json.loads(Path(found["path"]).read_text())
    assert stored["components"] == found["components"]
    assert cli.main(f"explain {folder / 'explained'} --plan {trial.number} --calibration-n 1".split()) == 0
    said = capsys.readouterr().out
    assert "on 1 calibration example of vqa (" in said
    assert "Share of that change by modality" in said
    native = next(trial for trial in study.trials() if trial.plan.is_native)
    assert cli.main(f"explain {folder / 'explained'} --plan {native.key}".split()) == 2
    assert "full precision has no damage to explain" in capsys.readouterr().err


def test_what_moved_each_number_of_a_box(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"sweep {MODEL} --task ground --by part --method rtn --bits 3 --search one-at-a-time --n 8"
    run(capsys, f"{line} --out {folder / 'boxes'} --json")
    uniform = next(trial for trial in Study(folder / "boxes").trials() if trial.plan.bits(16)["language"] == 3)
    found, _ = run(capsys, f"explain {folder / 'boxes'} --plan {uniform.key} --calibration-n 2 --json")
    assert list(found["boxes"]) == ["left", "top", "right", "bottom", "angle"]
    for one in found["boxes"].values():
        assert one["moved"] >= 0
        assert one["missing"] <= explaining.NUMBER_TOLERANCE + 0.01
        assert sum(one["components"].values()) == pytest.approx(one["change"], rel=one["missing"] + 1e-6, abs=1e-6)
    # what stands between the numbers is sure
    assert sum(one["change"] for one in found["boxes"].values()) == pytest.approx(found["change"], rel=0.2)


def test_boxes_of_a_file_of_ones_own_move_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The study knows the task by its name, `mine`, and not by the path that was given."""
    lines = []
    for one in task("ground", n=16).examples:
        Image.fromarray(np.asarray(one.image)).save(folder / f"{one.id}.png")
        lines.append({"image": f"{one.id}.png", "prompt": one.prompt, "boxes": [[4, 4, 20, 20]]})
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    line = f"sweep {MODEL} --task iou:{folder / 'mine.jsonl'} --by part --method rtn --bits 3 --search one-at-a-time"
    run(capsys, f"{line} --n 8 --out {folder / 'own'} --json")
    found, _ = run(capsys, f"explain {folder / 'own'} --plan 1 --calibration-n 2 --json")
    assert all(one["moved"] >= 0 for one in found["boxes"].values())


@pytest.mark.usefixtures("briefly_timed")
def test_a_forecast_of_a_plan_that_was_found_is_of_what_is_left(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{PLAN} --out {folder / 'again'}".replace("--trials 6", "--trials 2")
    new, _ = run(capsys, f"{line} --dry-run")
    made, _ = run(capsys, line)
    verified = Study(folder / "again" / "verify").counts()["done"]
    left, _ = run(capsys, f"{line} --dry-run")
    assert (new["measured"], left["measured"]) == (0, made["plans_measured"] + verified)
    assert left["plans"] == 0, "all trials have run, and what was found is verified"
    assert (new["found"], left["found"]) == (False, True)
    assert new["seconds"]["gradients"] > left["seconds"]["gradients"] == 0, "scores are kept"
    monkeypatch.setattr(planning, "proposal", lambda *_: [])
    more, _ = run(capsys, f"{line.replace('--trials 2', '--trials 9')} --dry-run")
    assert more["plans"] == 0, "no further plan promises a gain"
    assert more["measured"] == made["plans_measured"] + verified
    monkeypatch.setattr(planning, "proposal", lambda study, *_: [Plan.uniform(study.parts, scheme("rtn", 7))])
    more, _ = run(capsys, f"{line.replace('--trials 2', '--trials 9')} --dry-run")
    assert more["plans"] == 7, "as many as there may be"
    forgetful, _ = run(capsys, f"{line.replace('-n 4', '-n 7')} --dry-run")
    assert forgetful["seconds"]["gradients"] > 0
    other, _ = run(capsys, f"{line.replace('--bpw 4,3', '--bpw 5,3')} --dry-run")
    assert other["plans"] > 0
    assert not other["found"], "for other budgets, others may have to be verified"


@pytest.mark.usefixtures("briefly_timed")
def test_a_forecast_counts_scores_and_both_kinds_of_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = run(capsys, f"{PLAN} --out {folder / 'forecast'} --dry-run")
    assert found["seconds"]["gradients"] > 0
    assert found["seconds"]["calibration"] > 0  # although rounding to nearest needs none
    assert found["host"]["statistics"] > 0
    assert not (folder / "forecast").exists()
    line = PLAN.replace("4,3 ", "9 ") + " --allow vision=4,9 --allow language=4,16"
    _, err = run(capsys, f"{line} --out {folder / 'forecast'} --dry-run")
    assert "--allow vision=4,9: 9 allows nothing, since the widths here (--bits) are 2, 3, 4, 8, 16" in err
    assert "--allow language" not in err
    many, _ = run(capsys, f"{PLAN} --out {folder / 'forecast'} --dry-run --n 1000".replace("--n 12 ", ""))
    assert many["plans"] < found["plans"]  # plans that decide see a quarter of the examples then


SEARCH = f"sweep {MODEL} --by part --bits 2,4 --search frontier --trials 4 --n 5 --calibration-n 4 --task vqa --json"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_that_starts_from_scores(folder: Path, capsys: pytest.CaptureFixture[str], workers: int) -> None:
    out = folder / f"scored-{workers}"
    run(capsys, f"{SEARCH} --method rtn --scores swing,gram --workers {workers} --out {out}")
    study = Study(out)
    assert study.counts() == {"done": 4, "waiting": 0, "running": 0}
    kept = json.loads((out / "expected.json").read_text())
    assert kept["from"] == "swing, gram"
    capsys.readouterr()
    told = "redictions start from what swing, gram let expect"
    assert cli.main(f"recommend {out} --bpw 4 --no-run".split()) == 0
    assert f"note: p{told}" in capsys.readouterr().out
    assert json.loads((out / "plan.json").read_text())["provenance"]["expected"] == "swing, gram"
    assert cli.main(f"report {out}".split()) == 0
    assert "swing, gram" in (out / "report" / "index.html").read_text()
    line = f"{SEARCH} --method rtn --scores swing,gram --out {out}"
    assert run(capsys, line)[0]["expected_from"] == "swing, gram"
    assert cli.main(line.replace(" --json", "").split()) == 0
    assert f"P{told}" in capsys.readouterr().out
    assert {row["component"] for row in kept["damages"]} == {"vision", "connector", "language"}
    assert all(row["damage"] > 0 for row in kept["damages"])
    # full precision and one uniform plan; without scores a search opens with both uniform plans
    assert sum(trial.plan.is_uniform for trial in study.trials()) == 2


def test_scores_and_a_study_are_averaged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, out = folder / "for-a-prior", folder / "both"
    run(capsys, f"sweep {MODEL} --by part --bits 2,4,8 --method rtn --n 5 --task vqa --out {first} --json")
    run(capsys, f"{SEARCH} --method gptq --scores gram --prior {first} --out {out}")
    assert json.loads((out / "expected.json").read_text())["from"] == f"{first}, gram"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (SEARCH.replace("frontier", "tpe") + " --scores swing", "only frontier starts from what is expected"),
        (f"{SEARCH} --scores swign", "unknown score 'swign'"),
        (f"{SEARCH} --method gptq --path exposed --scores swing", "need the float path"),
        (SEARCH.replace("vqa", "retrieval").replace("scenes-llava", "scenes-blip2-itm") + " --scores swing",
         "has no answers in words"),
    ],
)  # fmt: skip
def test_scores_that_cannot_start_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    assert cli.main([*line.split(), "--out", str(tmp_path / "none")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
