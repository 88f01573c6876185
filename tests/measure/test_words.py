"""Embedding and output head as components: found in every family, counted, quantized, exported, or refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import saved_vlms
import small_vlms
import torch
from few import few
from PIL import Image

from sensitivity.api.sweeping import with_calibration
from sensitivity.cli.main import main
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.loop import _SharedWork
from sensitivity.models.discovery import discover, inspect
from sensitivity.models.loading import load
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import HEAD, VOCABULARY
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, scheme_of
from sensitivity.spec.runtimes.rules import violations
from sensitivity.spec.sizes import size
from sensitivity.tasks.table import task

SILENT = ("clip", "siglip")  # models that say nothing have no head


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("asked")
    draw, lines = np.random.default_rng(0), []
    for number in range(6):
        Image.fromarray(draw.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        line = {"image": f"{number}.png", "prompt": "where is the 3?", "answers": ["top left"]}
        lines.append(line | {"split": "evaluation" if number < 4 else "calibration"})
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder / "asked.jsonl")


def right(model: str, asked: str) -> str:
    """The same questions with what the model says as the right answers: where all is wrong there is nothing to rank."""
    said = evaluate(load(model, dtype="float32"), task(asked, n=4, whole=True))
    answers = dict(zip((str(one) for one in said["cluster"]), said["answer"], strict=True))
    lines = [json.loads(line) for line in Path(asked).read_text().splitlines()]
    for line in lines:
        line["answers"] = [answers.get(line["image"], "").strip() or "nothing"]
    file = Path(asked).with_name(f"{Path(model).parent.name}.jsonl")
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


@pytest.mark.parametrize("name", small_vlms.BUILDERS)
def test_words_are_components_of_every_family(name: str) -> None:
    model = small_vlms.on_meta(name)
    include = VOCABULARY[:1] if name in SILENT else VOCABULARY
    without, parts = discover(model, by="part"), discover(model, by="part", include=include)
    words = [weight for weight in parts.weights if weight.kind in VOCABULARY]
    assert parts.numel == without.numel
    assert {w.name for w in words}.isdisjoint(k.name for k in parts.kept)
    assert set(parts.names) - set(without.names) == {f"language.{weight.kind}" for weight in words}
    tied = [weight for weight in words if weight.tied]
    assert len(words) == (1 if tied or name in SILENT else 2)
    if tied:
        assert model.get_submodule(tied[0].reader).weight is model.get_parameter(tied[0].name)
    for by in ("group", "kind", "group.kind", "block"):
        assert set(parts.regroup(by).names) - set(without.regroup(by).names) == {f"language.{w.kind}" for w in words}


def test_what_cannot_be_included() -> None:
    with pytest.raises(UserError, match=r"unknown weight to include 'heads'.*embedding, head"):
        discover(small_vlms.on_meta("llava"), include=["heads"])
    with pytest.raises(UserError, match="CLIPModel has no head to include; leave it out"):
        discover(small_vlms.on_meta("clip"), include=["head"])


def test_sizes_count_words() -> None:
    parts = discover(small_vlms.on_meta("smolvlm"), by="part", include=VOCABULARY)
    four, eight = scheme("rtn", 4), scheme("rtn", 8)
    whole = size(parts, Plan.uniform(parts, eight))
    less = size(parts, Plan.of(parts, {"language.head": four}, eight))
    assert whole.bits - less.bits == 4 * parts["language.head"].numel
    awq = scheme("awq", 4, group=8)
    (embedding,) = parts["language.embedding"].weights
    assert scheme_of(embedding, awq) == scheme("rtn", 4, group=8, symmetric=False)


@pytest.mark.parametrize("name", ["smolvlm", "internvl", "blip2_t5"])  # apart; tied; tied, behind an encoder
@pytest.mark.parametrize("method", few(["gptq", "awq"], ["gptq"]))
def test_the_fast_path_is_the_plain_one(name: str, method: str, asked: str, tmp_path: Path) -> None:
    vlm = load(str(saved_vlms.save(name, tmp_path / "model")), dtype="float32")
    parts = inspect(vlm, "part", VOCABULARY)
    widths = [scheme(method, bits, group=8) for bits in (3, 8)]
    examples = task(asked, n=4)
    (low, high), statistics = with_calibration(vlm, parts, widths, [asked], n=2, against=[examples], cache_gb=0)
    words = [one for one in parts.names if one.rpartition(".")[2] in VOCABULARY]
    plans = [
        Plan.uniform(parts, high),
        *(Plan.of(parts, {one: low}, high) for one in words),
        Plan.of(parts, {words[0]: None}, high),
    ]
    fast, plain = (_SharedWork(vlm, parts, [examples], slow, statistics) for slow in (False, True))
    fast.prepare(plans)
    seen = []
    for plan in plans:
        one, other = fast.run(plan, 0, 4), plain.run(plan, 0, 4)
        np.testing.assert_allclose(one["nll"], other["nll"], rtol=1e-4)
        seen.append(one["nll"])
        with quantized(vlm.model, parts, plan, statistics=statistics) as changed:
            assert {w.name for c in words if plan[c] for w in parts[c].weights} <= changed
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    head = next(weight for weight in parts.weights if weight.kind == HEAD)
    assert vlm.model.get_submodule(head.reader).weight.data_ptr() == vlm.model.get_parameter(head.name).data_ptr()


def test_formats_that_cannot_hold_words_say_so() -> None:
    apart = discover(small_vlms.on_meta("smolvlm"), by="part", include=VOCABULARY)
    tied = discover(small_vlms.on_meta("internvl"), by="part", include=["head"])
    only = {"language.embedding": scheme("rtn", 4), "language.head": scheme("rtn", 4)}
    found = violations(apart, Plan.of(apart, only), "awq")
    assert "keeps the embedding in full precision; sweep without --include embedding, or use --format fake" in found[0]
    assert any("keeps the output head in full precision" in one for one in found)
    assert not [one for one in violations(apart, Plan.of(apart, only), "compressed-tensors") if "output head" in one]
    (one,) = violations(tied, Plan.of(tied, {"language.head": scheme("rtn", 4)}), "compressed-tensors")
    assert "embedding that is the output head too" in one
    assert not violations(apart, Plan.of(apart, only), "fake")


@pytest.mark.parametrize("name", few(["smolvlm", "internvl"], ["smolvlm"]))
def test_from_a_sweep_to_an_export(name: str, asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, study = str(saved_vlms.save(name, tmp_path / "model")), str(tmp_path / "study")
    asked = right(model, asked)
    asking = [model, "--include", "embedding,head", "--by", "part", "--bits", "4,8"]
    assert main(["inspect", *asking, "--json"]) == 0
    names = {one["name"] for one in json.loads(capsys.readouterr().out)["components"]}
    assert "language.head" in names
    sweep = ["--task", asked, "--n", "4", "--search", "one-at-a-time", "--out", study, "--json", "--dtype", "fp32"]
    assert main(["sweep", *asking, *sweep]) == 0
    assert main(["recommend", study, "--bpw", "9", "--no-run", "--json"]) == 0
    capsys.readouterr()
    for number, form in enumerate(["fake", "plan"]):
        out = str(tmp_path / f"export-{number}")
        assert main(["export", f"{study}/plan.json", "--format", form, "--out", out]) == 0
    own, written = load(model, dtype="float32").model, load(str(tmp_path / "export-0"), dtype="float32").model
    assert not torch.equal(own.get_output_embeddings().weight, written.get_output_embeddings().weight)


@pytest.mark.slow
def test_words_are_ranked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = str(tmp_path / "study")
    asking = ["--include", "embedding,head", "--bits", "2,3,8", "--search", "one-at-a-time", "--n", "60"]
    assert main(["sweep", "embedded:scenes-llava", *asking, "--task", "vqa", "--out", study, "--json"]) == 0
    capsys.readouterr()
    assert main(["rank", study, "--json"]) == 0
    assert "language.head" in capsys.readouterr().out
