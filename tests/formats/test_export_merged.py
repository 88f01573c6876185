"""Exports of models that no checkpoint holds as they were measured: merged adapters, and LLaVA's original layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_vlms import adapter, in_pickles

from experiments.small import models
from sensitivity.api import exporting
from sensitivity.api.sweeping import sweep
from sensitivity.cli import main as cli
from sensitivity.formats.verification import compare_answers, rerun
from sensitivity.formats.writing.job import Job
from sensitivity.formats.writing.source import open_checkpoint
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.spec.plan_file import write_file
from sensitivity.study.study import Study

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
KINDS = ("adapter", "original", "adapter of original")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    adapter(models.save("llava", made / "llava"), made / "adapter")
    adapter(models.save("geochat", made / "original"), made / "adapter of original")
    in_pickles(made / "original")
    (made / "original" / "generation_config.json").write_text('{"repetition_penalty": 9.0}')  # nobody reads it here
    return made


@pytest.fixture(scope="module")
def studies(folder: Path) -> dict[str, Study]:
    found = {}
    for name in KINDS:
        vlm = load(str(folder / name), dtype="float32")
        parts = inspect(vlm, by="part")
        found[name] = sweep(vlm, parts, [plan_of(name, folder)], ["vqa"], folder / f"{name} study", n=4)
    return found


def plan_of(name: str, folder: Path) -> Plan:
    parts = inspect(str(folder / name), by="part")
    widths = {"vision": scheme("rtn", 4, group="row"), "language": scheme("rtn", 8, group="row")}
    return Plan.of(parts, {**widths, "connector": None})


@pytest.mark.parametrize("format", ["fake", "compressed-tensors"])
@pytest.mark.parametrize("name", KINDS)
def test_an_export_answers_as_measured(
    folder: Path, studies: dict[str, Study], name: str, format: str, tmp_path: Path
) -> None:
    study, plan = studies[name], plan_of(name, folder)
    out = exporting.export(study, plan, tmp_path / "out", format)
    facts = json.loads((out / "sensitivity.json").read_bytes())
    rerun(str(out), str(tmp_path / "rows"), facts["dtype"], facts["trial"], "cpu")
    expected = study.examples(plan)
    assert expected is not None
    outcome = compare_answers(expected, pd.read_parquet(tmp_path / "rows"))
    assert (outcome["verdict"], outcome["examples"]) == ("as measured", 4)
    assert outcome["largest_nll_difference"] < 1e-4
    written = {file.name for file in out.iterdir()}
    assert {"tokenizer.json", "config.json", "processor_config.json"} <= written
    assert not [file for file in written if file.startswith(("pytorch_model", "adapter"))]
    assert json.loads((out / "config.json").read_bytes())["architectures"] == ["LlavaForConditionalGeneration"]


@pytest.mark.slow
def test_from_the_command_line_to_a_fresh_process(
    folder: Path, studies: dict[str, Study], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = studies["original"]
    words = [str(study.path), "--bpw", "16", "--out", str(tmp_path / "out"), "--format", "compressed-tensors"]
    assert cli.main(["export", *words]) == 2  # a random model scores 0: no plan can be preferred to another
    assert "full precision scored 0 on 'vqa', so there is nothing to lose" in capsys.readouterr().err
    plan = write_file(study.parts, plan_of("original", folder), {"study": str(study.path)}, tmp_path / "plan.json")
    words = [str(plan), "--out", str(tmp_path / "out"), "--format", "compressed-tensors"]
    assert cli.main(["export", *words]) == 0
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    assert "all 4 answers and scores are those that were measured" in capsys.readouterr().out
    assert exporting.export(studies["adapter"], plan_of("adapter", folder), tmp_path / "again", "plan").exists()


def test_a_checkpoint_in_another_layout_is_read_tensor_by_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is built from weights, and what is converted is what loading makes of it."""
    model = load(str(folder / "original")).model
    monkeypatch.setattr("sensitivity.models.loading._with_weights", None)
    source = open_checkpoint(str(folder / "original"))
    assert {t.key for t in source.tensors} == set(dict(model.named_parameters()))
    for tensor in source.tensors:
        assert torch.equal(tensor.read(), model.get_parameter(tensor.parameter)), tensor.key
        assert (tensor.dtype, tensor.shape) == (torch.bfloat16, tuple(model.get_parameter(tensor.parameter).shape))


def test_an_adapter_is_merged_in_the_type_that_was_measured(folder: Path) -> None:
    parts = inspect(str(folder / "adapter"), by="part")
    for dtype in (torch.float32, torch.bfloat16):
        job = Job(str(folder / "adapter"), parts, Plan.uniform(parts, None), dtype=dtype)
        model = load(str(folder / "adapter"), dtype=dtype).model
        for tensor in job.source.tensors:
            assert torch.equal(tensor.read(), model.get_parameter(tensor.parameter)), tensor.key


def test_what_is_missing_or_not_placed_is_named(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder / "original", tmp_path / "broken"))
    first = torch.load(broken / "pytorch_model-00001-of-00002.bin")
    lost = next(iter(first))
    del first[lost]
    torch.save(first, broken / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(UserError, match=r"the checkpoint of .*broken lacks .*; fetch it again"):
        open_checkpoint(str(broken))


# -- a base model that lies elsewhere than the adapter says


@pytest.fixture
def apart(folder: Path, tmp_path: Path) -> Path:
    """An adapter that names a model of the hub, which is out of reach here."""
    made = Path(shutil.copytree(folder / "adapter", tmp_path / "apart"))
    config = json.loads((made / "adapter_config.json").read_bytes())
    (made / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/llava-7b"}))
    return made


@pytest.mark.usefixtures("briefly_timed")
def test_a_base_model_that_is_not_there_can_be_named_behind_an_at(
    apart: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no way there")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(UserError) as failed:
        load(str(apart))
    said = str(failed.value)
    assert said.startswith(f"{apart} is an adapter for someone/llava-7b, which cannot be loaded (")
    assert said.endswith(f"; type {apart}@FOLDER, where FOLDER holds that model")
    name = f"{apart}@{folder / 'llava'}"
    theirs = load(str(folder / "adapter")).model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in load(name).model.state_dict().items())
    assert cli.main(["inspect", name, "--config-only"]) == 0
    out = str(apart.parent / "run")
    words = ["sweep", name, "--task", "vqa", "--n", "3", "--bits", "8", "--group", "row", "--out", out]
    assert cli.main([*words, "--dry-run"]) == 0
    assert cli.main([*words, "--json"]) == 0
    study = Study(out)
    exporting.export(study, Plan.uniform(study.parts, scheme("rtn", 8, group="row")), apart.parent / "out", "fake")
    assert "host memory" in capsys.readouterr().out


def test_what_is_no_adapter_takes_no_base_model(folder: Path) -> None:
    name = f"{folder / 'llava'}@{folder / 'original'}"
    with pytest.raises(
        UserError, match=r"llava is not an adapter, and only an adapter takes a base model after an @; type .*llava$"
    ):
        load(name)
    with pytest.raises(UserError, match="embedded:scenes-llava is not an adapter"):
        inspect("embedded:scenes-llava@x")


def test_a_folder_with_an_at_in_its_name_is_a_folder(folder: Path, tmp_path: Path) -> None:
    named = Path(shutil.copytree(folder / "llava", tmp_path / "llava@7b"))
    assert load(str(named)).fingerprint == load(str(folder / "llava")).fingerprint
    tensors = load_file(named / "model.safetensors")
    save_file(tensors, named / "model.safetensors", metadata={"format": "pt"})
