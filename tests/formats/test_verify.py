"""verify: a fresh process answers as measured, or says how not; legalize: the best legal plan, by brute force too."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import saved_vlms
from PIL import Image

from sensitivity.analysis.allocate import legal
from sensitivity.analysis.allocate.budget import solve
from sensitivity.analysis.reporting.page import report
from sensitivity.api import exporting
from sensitivity.api.recommending import recommend
from sensitivity.api.sweeping import sweep
from sensitivity.cli import main as cli
from sensitivity.formats.table import EXPECTED
from sensitivity.formats.verification import compare_answers, rerun, verify
from sensitivity.formats.writing import manifest
from sensitivity.measure.calibrate.calibration import calibration_statistics
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.files import begin_folder
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.plan_file import write_file
from sensitivity.spec.runtimes.rules import violations
from sensitivity.spec.sizes import size
from sensitivity.study.exports import notes_of
from sensitivity.study.study import Study


def rtn(bits: int, group: int | str = "row", symmetric: bool = True) -> Scheme:
    return Scheme("rtn", bits, group, symmetric)


MIXED = {"vision": rtn(4, 32), "connector": None, "language": rtn(3)}


@pytest.fixture(scope="module")
def study(scenes_llava: VLM, tmp_path_factory: pytest.TempPathFactory) -> Study:
    parts = inspect(scenes_llava, by="part")
    plans = [Plan.of(parts, MIXED), Plan.uniform(parts, rtn(2))]
    return sweep(scenes_llava, parts, plans, ["vqa"], tmp_path_factory.mktemp("runs") / "one", n=20)


@pytest.fixture(scope="module")
def export(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = Plan.of(study.parts, MIXED)
    return exporting.export(study, plan, tmp_path_factory.mktemp("out") / "ct", "compressed-tensors")


def test_an_export_answers_as_measured(export: Path, study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(export)]) == 0
    assert "all 20 answers and scores are those that were measured" in capsys.readouterr().out
    stored = json.loads((export / manifest.VERIFIED).read_bytes())
    assert (stored["verdict"], stored["examples"], stored["answers_that_differ"]) == ("as measured", 20, 0)
    row = study.table().set_index("key").loc[Plan.of(study.parts, MIXED).key]
    assert stored["mean_score"]["vqa"] == pytest.approx(row["vqa"])
    assert manifest.damaged_files(export, manifest.read(export)) == []


def test_the_card_tells_scores_size_and_how_to_load(export: Path, study: Study) -> None:
    card = (export / "README.md").read_text(encoding="utf-8")
    row = study.table().set_index("key").loc[Plan.of(study.parts, MIXED).key]
    assert f"| vqa | {row['vqa']:.4f} | {row['vqa.low']:.4f} to {row['vqa.high']:.4f} | 20 |" in card
    assert "| language | rtn | 3 | row | symmetric |" in card
    assert "| connector | native |" in card
    counts = [f"{row[f'vqa.{name}']:.0f}" for name in ("to_wrong", "to_right", "empty", "cut", "malformed")]
    assert f" | {' | '.join(counts)} |" in card
    assert "| right → wrong | wrong → right | empty answers | cut off | malformed |" in card
    lost = max(study.counts_by_kind(Plan.of(study.parts, MIXED))[1:], key=lambda kind: kind["to_wrong"])  # type: ignore[arg-type,return-value]
    assert f"{lost['kind']} {lost['to_wrong']} of {lost['n']}" in card or not lost["to_wrong"]
    assert "* benchmark: vqa, at most 20 examples drawn with seed" in card
    assert "* method: rtn, without calibration" in card
    assert re.search(r"\* versions: .*torch \d", card)
    assert 'from_pretrained(FOLDER, dtype="float32")' in card


@pytest.mark.parametrize("name", ["blip2_opt", "qwen2_5_vl"])
def test_other_families_answer_as_measured(name: str, tmp_path: Path) -> None:
    """What the fresh process does, in this one: the files alone give the trial's answers and likelihoods."""
    draw = np.random.default_rng(0)
    lines = []
    for i in range(3):
        Image.fromarray(draw.integers(0, 255, (20, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "prompt": "where is the 3?", "answers": ["top left"]})
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    vlm = load(str(saved_vlms.save(name, tmp_path / name)))
    parts = inspect(vlm, by="part")
    plan = Plan.of(parts, {"vision": rtn(4), "connector": None, "language": rtn(3)})
    study = sweep(vlm, parts, [plan], [str(tmp_path / "own.jsonl")], tmp_path / "run")
    out = exporting.export(study, plan, tmp_path / "out", "compressed-tensors")
    facts = manifest.read(out)
    rerun(str(out), str(tmp_path / "rows.parquet"), facts["dtype"], facts["trial"], "cpu")
    found = compare_answers(pd.read_parquet(out / EXPECTED), pd.read_parquet(tmp_path / "rows.parquet"))
    assert (found["verdict"], found["examples"]) == ("as measured", 3)
    assert found["largest_nll_difference"] < 1e-4


def test_a_changed_file_is_told_before_anything_runs(export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(export, folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 255
    (folder / "model.safetensors").write_bytes(content)
    found = verify(str(folder))  # a name, too
    assert found["verdict"] == "damaged"
    assert "model.safetensors was changed" in found["words"]
    assert json.loads((folder / manifest.VERIFIED).read_bytes())["verdict"] == "damaged"
    assert cli.main(["verify", str(folder)]) == 1


def test_formats_of_other_runtimes_are_whole_but_not_run(study: Study, tmp_path: Path) -> None:
    plan = Plan.of(study.parts, {"vision": rtn(4, 32), "connector": None, "language": rtn(3)})
    found = verify(exporting.export(study, plan, tmp_path / "out", "gptq"))
    assert found["verdict"] == "whole"
    assert "answers were not compared" in found["words"]


def test_a_plan_that_was_never_measured_says_so(study: Study, tmp_path: Path) -> None:
    found = verify(exporting.export(study, Plan.uniform(study.parts, rtn(5)), tmp_path / "out", "compressed-tensors"))
    assert "never measured" in found["words"]


def rows(answers: str, scores: str, nll: float = 1.0) -> pd.DataFrame:
    n = range(len(answers))
    return pd.DataFrame(
        {
            "task": "vqa",
            "example": [f"e{i}" for i in n],
            "answer": list(answers),
            "score": [float(s) for s in scores],
            "nll": nll,
        }
    )


def test_differences_are_counted_example_by_example() -> None:
    same = compare_answers(rows("abcd", "1101"), rows("abcd", "1101"))
    assert (same["verdict"], same["largest_nll_difference"]) == ("as measured", 0.0)
    other = compare_answers(rows("abcd", "1101"), rows("abxd", "1111"))
    assert (other["verdict"], other["answers_that_differ"], other["scores_that_differ"]) == ("different", 1, 1)
    fewer = compare_answers(rows("abcd", "1101"), rows("abc", "110"))
    assert fewer["verdict"] == "different"
    assert "1 examples are not in both" in fewer["words"]
    drift = compare_answers(rows("abcd", "1101"), rows("abcd", "1101", nll=1.01))
    assert drift["verdict"] == "as measured"
    assert "log-likelihoods differ by up to 0.01" in drift["words"]


def test_another_model_than_the_measured_one_is_refused(study: Study, tmp_path: Path) -> None:
    other = "embedded:scenes-llava-heavy"
    with pytest.raises(UserError, match="is another model"):
        exporting.export(study, Plan.of(study.parts, MIXED), tmp_path / "out", "fake", model=other)


# -- a sweep for one runtime


@pytest.mark.parametrize("search", ["grid", "frontier"])
def test_a_sweep_for_a_runtime_says_what_it_leaves_out_and_tries_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], search: str
) -> None:
    args = ["sweep", "embedded:scenes-llava", "--n", "2", "--group", "32", "--runtime", "modelopt", "--search", search]
    out = tmp_path / "run"
    assert cli.main([*args, "--bits", "3,4,8", "--trials", "3", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert (
        "modelopt restricts the space: rtn:3 of all parts: ModelOpt loads symmetric codes of 4, 8 bits, not 3"
        in said.err
    )
    assert "rtn:8 of all parts: ModelOpt takes groups of row at 8 bits, not 32" in said.err
    assert f"recommend {out} --bpw 5 --runtime modelopt" in said.out  # less than the smallest plan takes is no budget
    study = Study(out)
    plans = [trial.plan for trial in study.trials()]
    assert len(plans) > 1
    assert not [plan.describe() for plan in plans if violations(study.parts, plan, "modelopt")]


def test_a_sweep_of_what_a_runtime_cannot_load_does_not_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["sweep", "embedded:scenes-llava", "--runtime", "awq", "--bits", "3", "--out", str(tmp_path / "run")]
    assert cli.main(args) == 2
    assert "awq can load none of these schemes: rtn:3 of all parts" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- another calibration path


@pytest.fixture(scope="module")
def calibrated(scenes_llava: VLM, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Plan]:
    """A study in which one plan of GPTQ at 2 bits was measured on the float path."""
    parts = inspect(scenes_llava, by="part")
    statistics = calibration_statistics(scenes_llava, parts, ["vqa"], n=4)
    chosen = scheme("gptq", 2, group=32, calibration=statistics.facts)
    plan = Plan.of(parts, {"vision": chosen, "connector": chosen})
    out = tmp_path_factory.mktemp("runs") / "gptq"
    return sweep(scenes_llava, parts, [plan], ["vqa"], out, n=12, statistics=statistics), plan


@pytest.mark.usefixtures("undrawn")
def test_the_exposed_path_is_measured_against_the_other_on_fresh_examples(
    calibrated: tuple[Study, Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, plan = calibrated
    write_file(study.parts, plan, {}, study.path / "plan.json")
    args = ["export", str(study.path / "plan.json"), "--format", "compressed-tensors", "--path", "exposed"]
    assert cli.main([*args, "--out", str(tmp_path / "out")]) == 0
    facts = manifest.read(tmp_path / "out")
    other = Plan.from_json(facts["plan"])
    assert {one["path"] for _, one in other.schemes if one} == {"exposed"}
    second = Study(study.path / "verify")
    assert second.meta["seed"] != study.meta["seed"]
    ours, theirs = second.examples(other), second.examples(plan)
    assert ours is not None
    assert theirs is not None
    gain = facts["trial"]["path_gain"]["vqa"]
    assert (gain["mean"], gain["n"]) == (pytest.approx((ours["score"] - theirs["score"]).mean()), 12)
    likelier = (theirs["nll"] - ours["nll"]).mean()
    assert gain["log_likelihood"]["mean"] == pytest.approx(likelier)
    assert (theirs["nll"] - ours["nll"]).abs().max() > 1e-3  # the two paths are not the same weights
    said = capsys.readouterr().out
    words = "Calibrated again on the exposed path. Against the path on which the plan was chosen, paired on the same "
    words += f"examples: vqa {gain['mean']:+.4f}"
    assert words in said
    assert words in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("No score rose" in said) == (gain["mean"] <= 0)
    scores = gain["scores"]
    assert gain["mean"] == pytest.approx(scores["ours"]["mean"] - scores["theirs"]["mean"])
    page = html.unescape(report(study, tmp_path / "report", bootstraps=2).read_text(encoding="utf-8"))
    assert f"{tmp_path / 'out'}: {words}" in page
    assert "<td>compressed-tensors</td>" in page
    assert '<td class="left">not verified</td>' in page
    outcome = {"verdict": "as measured", "words": "all of it", "time": "2026-11-25T00:00:00Z", "key": "0" * 16}
    manifest.store_verification(tmp_path / "out", outcome)
    assert [one["state"] for one in notes_of(study.path)] == ["as measured"]
    shutil.rmtree(tmp_path / "out")
    assert [one["state"] for one in notes_of(study.path)] == ["no longer there"]


def test_a_path_that_changes_nothing_is_refused(calibrated: tuple[Study, Plan], study: Study, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--path float changes nothing: this plan was measured on the float path"):
        exporting.export(*calibrated, tmp_path / "out", "fake", path="float")
    with pytest.raises(UserError, match=r"--path exposed changes nothing: this plan has no method that is calibrated"):
        exporting.export(study, Plan.of(study.parts, MIXED), tmp_path / "out", "fake", path="exposed")
    with pytest.raises(UserError, match=r"unknown calibration path 'exposd'; choose from float, exposed"):
        exporting.export(*calibrated, tmp_path / "out", "fake", path="exposd")


# -- legalize


CHOICES: list[Scheme | None] = [None, rtn(8), rtn(4), rtn(4, 32), rtn(3), rtn(3, 32, False)]
DAMAGE = {8: 0.0, 4: 0.05, 3: 0.2}


@pytest.fixture(scope="module")
def planted(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Every plan over three parts, with a score that adds up: vision suffers twice as much as the others."""
    parts: ComponentMap = study.parts
    share = dict(zip(parts.names, (2.0, 1.0, 1.0), strict=True))
    made = Study.create(tmp_path_factory.mktemp("planted") / "s", parts, ["vqa"], {"model": parts.model})
    plans, scores = [], []
    for chosen in itertools.product(CHOICES, repeat=3):
        plan = Plan(tuple(zip(parts.names, chosen, strict=True)))
        lost = sum(share[name] * DAMAGE[s.bits] * (0.8 if s.group == 32 else 1.0) for name, s in plan.schemes if s)
        plans.append(plan)
        scores.append({"vqa": max(0.9 - lost / 2, 0.05)})
    made.append(plans, scores)
    return made


@pytest.mark.parametrize("runtime", ["compressed-tensors", "vllm", "awq"])
def test_the_legal_plan_is_the_best_that_brute_force_finds(planted: Study, runtime: str) -> None:
    asked = Plan(tuple(zip(planted.parts.names, (rtn(3, 32, False), rtn(3), rtn(3, 32, False)), strict=True)))
    budget = 7.0
    found = exporting.legalize(planted, asked, runtime, bpw=budget)
    assert violations(planted.parts, found.plan, runtime) == []
    assert found.after.bpw <= budget
    scores = {trial.key: trial.scores["vqa"]["mean"] for trial in planted.trials()}
    legal = [trial.plan for trial in planted.trials() if not violations(planted.parts, trial.plan, runtime)]
    fitting = [plan for plan in legal if size(planted.parts, plan).bpw <= budget]
    best = max(scores[plan.key] for plan in fitting)
    assert scores[found.plan.key] == pytest.approx(best, abs=0.02)  # the surrogate is a model: a near tie may win


@pytest.mark.parametrize("runtime", ["gptq", "awq", "compressed-tensors"])
def test_a_budget_for_a_runtime_counts_what_its_files_weigh(planted: Study, runtime: str) -> None:
    """Planted: plans that fit by their own count and not as the format stores them, which keeps more."""
    parts = planted.parts
    uniform = Plan.uniform(parts, rtn(4, 32))
    own, stored = size(parts, uniform), size(parts, uniform, runtime)
    assert own.bits < stored.bits
    budget = (own.bits + 64) / parts.numel
    found = exporting.legalize(planted, Plan.uniform(parts, None), runtime, bpw=budget)
    assert found.after == size(parts, found.plan, runtime)
    assert found.after.bpw <= budget < stored.bpw
    scores = {trial.key: trial.scores["vqa"]["mean"] for trial in planted.trials()}
    plans = [trial.plan for trial in planted.trials()]
    fitting = [p for p in plans if not violations(parts, p, runtime) and size(parts, p, runtime).bpw <= budget]
    assert scores[found.plan.key] == pytest.approx(max(scores[plan.key] for plan in fitting), abs=0.02)
    chosen = recommend(planted, budget, runtime=runtime)
    assert (chosen.plan, chosen.size) == (found.plan, found.after)
    assert violations(parts, chosen.plan, runtime) == []
    if runtime == "gptq":  # which keeps most beside the codes
        freely = recommend(planted, budget)
        assert size(parts, freely.plan, runtime).bpw > budget


def test_what_fits_in_so_many_gb_fits_on_disk(
    planted: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tensors of a uniform plan would fit by 10 bytes; with their names and shapes they would not."""
    gb = (size(planted.parts, Plan.uniform(planted.parts, rtn(8)), "gptq").bytes + 10) / 1e9
    args = ["recommend", str(planted.path), "--runtime", "gptq", "--gb", f"{gb:.9f}", "--no-run"]
    assert cli.main(args) == 0
    assert "all stored in gptq files" in capsys.readouterr().out
    source, out = str(planted.path / "plan.json"), tmp_path / "out"
    assert cli.main(["export", source, "--format", "gptq", "--out", str(out)]) == 0
    on_disk = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert 0.7 * gb < on_disk / 1e9 <= gb
    plan = json.loads((planted.path / "plan.json").read_bytes())
    assert plan["stored_size"]["bytes"] == manifest.read(out)["written"]["bytes"]
    assert plan["size"]["bytes"] < plan["stored_size"]["bytes"]


def test_a_budget_for_a_format_is_one_for_its_files(
    planted: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = size(planted.parts, Plan.uniform(planted.parts, rtn(8))).bpw + 0.01
    args = ["export", str(planted.path), "--bpw", f"{budget:.4f}", "--format", "gptq", "--out", str(tmp_path / "out")]
    begin_folder(tmp_path / ".other.99999.1.unfinished")
    assert cli.main([*args, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["written"]["bpw"] <= budget
    removed = f"removed the unfinished folders of killed exports: {tmp_path}/.other.99999.1.unfinished"
    assert removed in [json.loads(line)["note"] for line in said.err.splitlines()]
    assert size(planted.parts, Plan.uniform(planted.parts, rtn(8)), "gptq").bpw > budget


def test_a_plan_that_is_too_large_is_not_called_legal_as_it_is(planted: Study) -> None:
    found = exporting.legalize(planted, Plan.uniform(planted.parts, rtn(8)), "gptq", bpw=6.0)
    assert found.violations == ()
    assert "all stored in gptq files" in found.words


def test_a_legal_plan_stays_and_costs_nothing(planted: Study) -> None:
    plan = Plan.uniform(planted.parts, rtn(4))
    found = exporting.legalize(planted, plan, "compressed-tensors")
    assert (found.plan, found.violations) == (plan, ())
    assert found.words == "nothing: the plan is legal as it is"


def test_a_plan_that_files_hold_wider_gives_way_to_a_better_one_of_the_same_files(
    planted: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GGUF's blocks have 4 bits or more: a part of 3 bits is as large there as one of 4."""
    plan = Plan.of(planted.parts, {"vision": rtn(3)}, rtn(4))
    found = exporting.legalize(planted, plan, "gguf")
    assert found.violations == ()
    assert found.after.bits <= found.before.bits
    assert found.plan["vision"].bits > 3  # type: ignore[union-attr]
    assert found.predicted_after.score > found.predicted_before.score  # type: ignore[union-attr]
    exporting.export(planted, plan, tmp_path / "plan.json")
    assert cli.main(["legalize", str(tmp_path / "plan.json"), "--runtime", "gguf"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"can be loaded, but there is a better plan of its size: .* gguf files instead of its own", said)
    kept = exporting.legalize(planted, found.plan, "gguf")
    assert kept.plan == found.plan
    assert kept.words.startswith("nothing")


def test_an_illegal_export_says_what_breaks_and_what_fits_at_what_cost(planted: Study, tmp_path: Path) -> None:
    plan = Plan.of(planted.parts, {"vision": rtn(3, 32, False)}, rtn(4))
    with pytest.raises(UserError) as caught:
        exporting.export(planted, plan, tmp_path / "out", "compressed-tensors")
    said = str(caught.value)
    assert "vision (rtn:3): transformers with compressed-tensors loads zero points at --group tensor" in said
    assert "The best plan of its size that fits is" in said
    assert "(predicted)" in said
    assert "bytes instead of" in said
    assert "`sensitivity legalize" in said


def test_of_a_study_the_best_plan_that_the_format_holds_is_exported(planted: Study, tmp_path: Path) -> None:
    best = solve(planted, bpw=6.0)[0].plan
    assert violations(planted.parts, best, "awq")  # so that leaving it out is what is tested
    with pytest.warns(Notice, match=r"^chosen for 6 bpw: "):
        exporting.export_from(planted.path, 6.0, tmp_path / "out", "awq", False)
    plan = Plan.from_json(manifest.read(tmp_path / "out")["plan"])
    assert plan == legal.best_legal_plan(planted, "awq", 6.0).plan
    assert violations(planted.parts, plan, "awq") == []


@pytest.mark.parametrize(
    ("format", "subject"), [("plan", "no plan"), ("fake", "no plan"), ("awq", "no plan that awq can load")]
)
def test_a_budget_that_no_plan_meets_is_not_blamed_on_a_format_that_holds_any(
    planted: Study, tmp_path: Path, format: str, subject: str
) -> None:
    with pytest.raises(UserError, match=rf"^{subject} fits 1\.00 bpw "):
        exporting.export_from(planted.path, 1.0, tmp_path / "out", format, False)


def test_a_plan_holds_no_weights_that_could_answer(
    planted: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exporting.export(planted, Plan.uniform(planted.parts, rtn(4)), tmp_path / "plan")
    for verb, status in (("verify", 0), ("bench", 2)):
        assert cli.main([verb, str(tmp_path / "plan")]) == status
        told = "".join(capsys.readouterr())
        assert "holds no weights" in told
        assert f"`sensitivity export {tmp_path}/plan/plan.json --format NAME --out DIR` writes some" in told


def test_a_format_that_holds_no_plan_of_a_study_says_what_to_sweep(planted: Study, tmp_path: Path) -> None:
    """Not that a larger budget would do."""
    with pytest.raises(UserError, match=r"^bnb can load no plan that this study measured; `sensitivity sweep "):
        exporting.export_from(planted.path, 3.0, tmp_path / "out", "bnb", False)


@pytest.mark.usefixtures("briefly_timed")
@pytest.mark.parametrize("format", ["bnb", "mlx"])
def test_the_sweep_that_is_offered_can_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    """Also of many components, of which a whole grid would have too many plans."""
    line = "sweep embedded:scenes-llava --by group.kind --method uniform --bits 8 --search random --trials 3 --n 3"
    assert cli.main([*line.split(), "--out", str(tmp_path / "run"), "--json"]) == 0
    capsys.readouterr()
    words = ["export", str(tmp_path / "run"), "--bpw", "9", "--format", format, "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    offered = re.search(r"`sensitivity (sweep [^`]*)`", capsys.readouterr().err)
    assert offered is not None
    assert " --by group.kind " in offered[1]
    assert " --n 3 " in offered[1]
    assert cli.main([*offered[1].split(), "--dry-run"]) == 0


def test_legalize_writes_a_plan_that_export_takes(
    planted: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["legalize", str(planted.path), "--bpw", "5", "--runtime", "awq", "--out", str(tmp_path / "plan.json")]
    assert cli.main([*args, "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["runtime"] == "awq"
    assert cli.main(["export", str(tmp_path / "plan.json"), "--format", "awq", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_nothing_legal_was_measured(planted: Study) -> None:
    none = (
        r"bnb can load no plan that this study measured; `sensitivity sweep .* --method nf4 --bits 4 --out .*-bnb` .*"
    )
    with pytest.raises(UserError, match=none + r"; it takes --method nf4 or fp4 or llm-int8 "):
        exporting.legalize(planted, Plan.uniform(planted.parts, rtn(3)), "bnb", bpw=4.0)
    with pytest.raises(
        UserError, match=r"^no plan that awq can load fits 2\.00 bpw \([^)]*\): with the measured widths"
    ):
        exporting.legalize(planted, Plan.uniform(planted.parts, rtn(3)), "awq", bpw=2.0)
