"""verify: a fresh process answers as measured, or says how not; legalize: the best legal plan, by brute force too."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sensitivity import cli, verbs
from sensitivity.components import ComponentMap
from sensitivity.errors import UserError
from sensitivity.export import manifest
from sensitivity.export.verify import compare, verify
from sensitivity.models import VLM, inspect
from sensitivity.plan import Plan, Scheme, size
from sensitivity.runtimes import breaches
from sensitivity.trials import Study


def rtn(bits: int, group: int | str = "row", symmetric: bool = True) -> Scheme:
    return Scheme("rtn", bits, group, symmetric)


MIXED = {"vision": rtn(4, 32), "connector": None, "language": rtn(3)}


@pytest.fixture(scope="module")
def study(scenes_llava: VLM, tmp_path_factory: pytest.TempPathFactory) -> Study:
    parts = inspect(scenes_llava, by="part")
    plans = [Plan.of(parts, MIXED), Plan.uniform(parts, rtn(2))]
    return verbs.sweep(scenes_llava, parts, plans, ["vqa"], tmp_path_factory.mktemp("runs") / "one", n=20)


@pytest.fixture(scope="module")
def export(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = Plan.of(study.parts, MIXED)
    return verbs.export(study, plan, tmp_path_factory.mktemp("out") / "ct", "compressed-tensors")


def test_an_export_answers_as_measured(export: Path, study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(export)]) == 0
    assert "all 20 answers and scores are those that were measured" in capsys.readouterr().out
    stored = json.loads((export / manifest.VERIFIED).read_bytes())
    assert (stored["verdict"], stored["examples"], stored["answers_that_differ"]) == ("as measured", 20, 0)
    row = study.table().set_index("key").loc[Plan.of(study.parts, MIXED).key]
    assert stored["mean_score"]["vqa"] == pytest.approx(row["vqa"])
    assert manifest.damage(export, manifest.read(export)) == []


def test_the_card_tells_scores_size_and_how_to_load(export: Path, study: Study) -> None:
    card = (export / "README.md").read_text(encoding="utf-8")
    row = study.table().set_index("key").loc[Plan.of(study.parts, MIXED).key]
    assert f"| vqa | {row['vqa']:.4f} | {row['vqa.low']:.4f} to {row['vqa.high']:.4f} | 20 |" in card
    assert "| language | rtn | 3 | row | symmetric |" in card
    assert "| connector | native |" in card
    assert 'from_pretrained(FOLDER, dtype="float32")' in card


def test_a_changed_file_is_told_before_anything_runs(export: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(export, folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 255
    (folder / "model.safetensors").write_bytes(content)
    found = verify(folder)
    assert found["verdict"] == "damaged"
    assert "model.safetensors was changed" in found["words"]
    assert json.loads((folder / manifest.VERIFIED).read_bytes())["verdict"] == "damaged"
    assert cli.main(["verify", str(folder)]) == 1


def test_formats_of_other_runtimes_are_whole_but_not_run(study: Study, tmp_path: Path) -> None:
    plan = Plan.of(study.parts, {"vision": rtn(4, 32), "connector": None, "language": rtn(3)})
    found = verify(verbs.export(study, plan, tmp_path / "out", "gptq"))
    assert found["verdict"] == "whole"
    assert "answers were not compared" in found["words"]


def test_a_plan_that_was_never_measured_says_so(study: Study, tmp_path: Path) -> None:
    found = verify(verbs.export(study, Plan.uniform(study.parts, rtn(5)), tmp_path / "out", "compressed-tensors"))
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
    same = compare(rows("abcd", "1101"), rows("abcd", "1101"))
    assert (same["verdict"], same["largest_nll_difference"]) == ("as measured", 0.0)
    other = compare(rows("abcd", "1101"), rows("abxd", "1111"))
    assert (other["verdict"], other["answers_that_differ"], other["scores_that_differ"]) == ("different", 1, 1)
    fewer = compare(rows("abcd", "1101"), rows("abc", "110"))
    assert fewer["verdict"] == "different"
    assert "1 examples are not in both" in fewer["words"]
    drift = compare(rows("abcd", "1101"), rows("abcd", "1101", nll=1.01))
    assert drift["verdict"] == "as measured"
    assert "log-likelihoods differ by up to 0.01" in drift["words"]


def test_another_model_than_the_measured_one_is_refused(study: Study, tmp_path: Path) -> None:
    other = "embedded:scenes-llava-heavy"
    with pytest.raises(UserError, match="is another model"):
        verbs.export(study, Plan.of(study.parts, MIXED), tmp_path / "out", "fake", model=other)


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
    found = verbs.legalize(planted, asked, runtime, bpw=budget)
    assert breaches(planted.parts, found.plan, runtime) == []
    assert found.after.bpw <= budget
    scores = {trial.user_attrs["key"]: trial.user_attrs["scores"]["vqa"]["mean"] for trial in planted.trials()}
    legal = [
        Plan.from_json(trial.user_attrs["plan"])
        for trial in planted.trials()
        if not breaches(planted.parts, Plan.from_json(trial.user_attrs["plan"]), runtime)
    ]
    fitting = [plan for plan in legal if size(planted.parts, plan).bpw <= budget]
    best = max(scores[plan.key] for plan in fitting)
    assert scores[found.plan.key] == pytest.approx(best, abs=0.02)  # the surrogate is a model: a near tie may win


def test_a_legal_plan_stays_and_costs_nothing(planted: Study) -> None:
    plan = Plan.uniform(planted.parts, rtn(4))
    found = verbs.legalize(planted, plan, "compressed-tensors")
    assert (found.plan, found.breaches) == (plan, ())
    assert found.words == "nothing: the plan is legal as it is"


def test_an_illegal_export_says_what_breaks_and_what_fits_at_what_cost(planted: Study, tmp_path: Path) -> None:
    plan = Plan.of(planted.parts, {"vision": rtn(3, 32, False)}, rtn(4))
    with pytest.raises(UserError) as caught:
        verbs.export(planted, plan, tmp_path / "out", "compressed-tensors")
    said = str(caught.value)
    assert "vision (rtn:3): transformers with compressed-tensors loads zero points of tensor groups" in said
    assert "The best plan of its size that fits is" in said
    assert "(predicted)" in said
    assert "bytes instead of" in said
    assert "`sensitivity legalize" in said


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
    with pytest.raises(UserError, match=r"nothing that was measured fits bnb in 4.00 bpw .* sweep schemes that it can"):
        verbs.legalize(planted, Plan.uniform(planted.parts, rtn(3)), "bnb", bpw=4.0)
