"""One plan of every method through a sweep of the embedded model, and what can be exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from few import few
from safetensors.torch import load_file

from sensitivity.api.exporting import export
from sensitivity.api.sweeping import sweep, with_calibration
from sensitivity.cli.main import main
from sensitivity.formats.verification import verify
from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.methods import METHODS
from sensitivity.quantize.presets import PRESETS
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solving import fake_quantize
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.study.exports import MANIFEST

MODEL = "embedded:scenes-llava"
Prepared = tuple[VLM, ComponentMap, list[Plan], Statistics]


def width_of(name: str) -> int:
    """A width of a method, or of the method of a preset."""
    widths = METHODS[str(PRESETS.get(name, {"method": name})["method"])].widths
    return min(widths, key=lambda bits: abs(bits - 3))


@pytest.fixture(scope="module")
def prepared(scenes_llava: VLM) -> Prepared:
    parts = inspect(scenes_llava, by="part")
    asked = [scheme(name, width_of(name)) for name in METHODS]
    schemes, statistics = with_calibration(scenes_llava, parts, asked, ["vqa"], n=4, cache_gb=0)
    assert statistics is not None
    return scenes_llava, parts, [Plan.of(parts, {"connector": chosen}) for chosen in schemes], statistics


def test_a_sweep_with_one_plan_of_each_runs(prepared: Prepared, tmp_path: Path) -> None:
    vlm, parts, plans, statistics = prepared
    fast = sweep(vlm, parts, plans, ["vqa"], tmp_path / "fast", n=4, statistics=statistics)
    plain = sweep(vlm, parts, plans[-3:], ["vqa"], tmp_path / "plain", n=4, statistics=statistics, plain=True)
    for plan in plans[-3:]:
        first, second = (study.examples(plan) for study in (fast, plain))
        assert first is not None
        assert second is not None
        # an answer may be cut off once it can no longer match, so scores are compared
        assert first["score"].tolist() == second["score"].tolist()
    assert all(fast.examples(plan) is not None for plan in plans)


@pytest.mark.parametrize("name", ["bivlm", "adpq", "binary"])
def test_what_no_runtime_holds_is_refused_with_a_way_out(name: str, prepared: Prepared, tmp_path: Path) -> None:
    vlm, parts, plans, statistics = prepared
    study = sweep(vlm, parts, plans[:1], ["vqa"], tmp_path / "study", n=4, statistics=statistics)
    (chosen,) = (p for p in plans if p["connector"] is not None and p["connector"].method == name)
    with pytest.raises(UserError, match=f"cannot hold what {name} stores; use --method .*, or --format fake"):
        export(study, chosen, tmp_path / "out", "compressed-tensors")
    written = export(study, chosen, tmp_path / "fake", "fake")
    assert written is not None


@pytest.mark.parametrize("name", few([*METHODS, *PRESETS], ["rtn", "gptq", "vlm-ptq", "squeezellm", "qvlm"]))
@pytest.mark.usefixtures("briefly_timed")
def test_each_has_a_forecast(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any weight is loaded, so that nothing can be calibrated."""
    words = f"sweep {MODEL} --bits {width_of(name)} --method {name} --n 8 --dry-run --out {tmp_path / 'out'}"
    assert main(words.split()) == 0, capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_preset_with_gradients_is_exported_as_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its codes are computed again for the export: from the same token weights."""
    study, out = tmp_path / "study", tmp_path / "out"
    sweeping = f"sweep {MODEL} --bits 4 --method tlq-gptq --group 32 --n 8 --calibration-n 4 --out {study}"
    assert main(sweeping.split()) == 0
    assert main(f"export {study} --bpw 8 --format compressed-tensors --out {out}".split()) == 0
    assert main(f"verify {out} --json".split()) == 0, capsys.readouterr().err


def export_of(plan: Plan, vlm: VLM, parts: ComponentMap, folder: Path) -> Path:
    """A plan after a sweep of a few examples, as compressed-tensors holds it."""
    asked = [one for _, one in plan.schemes if one]
    schemes, statistics = with_calibration(vlm, parts, asked, ["vqa"], n=4, cache_gb=0)
    plan = Plan(tuple(zip(parts.names, schemes, strict=True)))
    study = sweep(vlm, parts, [plan], ["vqa"], folder / "study", n=8, statistics=statistics)
    return export(study, plan, folder / "out", "compressed-tensors")


def test_weights_beside_rounded_activations_are_bytes(scenes_llava: VLM, tmp_path: Path) -> None:
    parts = inspect(scenes_llava, by="part")
    chosen = scheme("rtn", 4, activations=8)
    out = export_of(Plan.uniform(parts, chosen), scenes_llava, parts, tmp_path)
    config = json.loads((out / "config.json").read_bytes())["quantization_config"]
    assert {group["input_activations"]["num_bits"] for group in config["config_groups"].values()} == {8}
    assert config["format"] == "int-quantized"
    held = load_file(out / "model.safetensors")
    key = next(name for name in held if "multi_modal_projector" in name and held[name].dtype == torch.int8)
    own = scenes_llava.model.get_parameter(next(w.name for w in parts["connector"].weights if key.endswith(w.name[6:])))
    assert torch.equal(held[key].float() * held[f"{key}_scale"].float(), fake_quantize(own.detach(), chosen))
    manifest = json.loads((out / MANIFEST).read_bytes())
    assert manifest["written"]["bytes"] == manifest["predicted_size"]["bytes"]


@pytest.mark.slow  # a fresh process loads the export
@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_activations_are_exported_as_measured(bits: int, scenes_llava: VLM, tmp_path: Path) -> None:
    """compressed-tensors rounds them by itself when the export is run, with a scale for each token, as we do."""
    parts = inspect(scenes_llava, by="part")
    mixed = {"*": scheme("rtn", bits, activations=8), "language": scheme("gptq", 4, group=32)}
    assert verify(export_of(Plan.of(parts, mixed), scenes_llava, parts, tmp_path))["verdict"] == "as measured"
