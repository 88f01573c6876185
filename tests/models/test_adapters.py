"""A LoRA adapter in a folder of its own is in the weights before anything is quantized; what does not fit is named."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import saved_vlms
import torch
from safetensors.torch import load_file, save_file

from sensitivity.api.sweeping import sweep
from sensitivity.measure.evaluation import evaluate
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.tasks.table import task

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_vlms.save("llava", tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def trained(base: Path) -> Path:
    return saved_vlms.adapter(base, base.parent / "lora")


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "lora"))


def weight(vlm: VLM, layer: int, name: str) -> torch.Tensor:
    found: torch.Tensor = vlm.model.model.language_model.layers[layer].self_attn.get_submodule(name).weight
    return found


def test_the_weights_are_those_of_the_base_and_the_product(base: Path, trained: Path) -> None:
    plain, merged = load(str(base)), load(str(trained))
    tensors = load_file(trained / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 5  # A and B of two linears in five blocks
    for layer in range(5):
        for name in ("q_proj", "v_proj"):
            here = f"base_model.model.model.language_model.layers.{layer}.self_attn.{name}.lora_"
            product = tensors[here + "B.weight"] @ tensors[here + "A.weight"] * (8 / 2)
            assert torch.allclose(weight(merged, layer, name), weight(plain, layer, name) + product, atol=1e-6)
            assert product.abs().max() > 0.1
        assert torch.equal(weight(merged, layer, "k_proj"), weight(plain, layer, "k_proj"))
    assert [name for name, _ in merged.model.named_parameters()] == [name for name, _ in plain.model.named_parameters()]
    assert not any(p.requires_grad for p in merged.model.parameters())
    assert merged.processor is not None
    assert merged.name == str(trained)
    assert merged.fingerprint != plain.fingerprint


def test_parts_are_known_without_weights(base: Path, trained: Path) -> None:
    assert inspect(str(trained)).weights == inspect(load(str(trained))).weights == inspect(str(base)).weights


def test_a_base_beside_the_adapter(folder: Path, base: Path) -> None:
    shutil.copytree(base, folder.parent / "llava-7b")
    edit(folder, base_model_name_or_path="../llava-7b")
    assert inspect(load(str(folder))).weights == inspect(str(base)).weights


def test_another_adapter_is_another_model(folder: Path, trained: Path) -> None:
    before = load(str(folder), config_only=True).fingerprint
    assert before == load(str(trained), config_only=True).fingerprint
    before = load(str(folder)).fingerprint
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    assert load(str(folder)).fingerprint != before


def edit(folder: Path, **values: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_base_that_is_not_named(folder: Path) -> None:
    edit(folder, base_model_name_or_path=None)
    with pytest.raises(UserError, match=r"names no base model; type .*lora@BASE, where BASE is its folder"):
        load(str(folder))


def test_an_adapter_without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors; save the adapter with"):
        load(str(folder))


@pytest.mark.parametrize("astray", ["lacks tensors for", "has tensors for no layer of"])
def test_tensors_without_a_place(folder: Path, astray: str) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.language_model.layers.4.self_attn.v_proj.lora_B.weight"
    if astray.startswith("lacks"):
        del tensors[name]
    else:
        tensors[name.replace("layers.4", "layers.9")] = tensors[name].clone()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{astray} its base model: .*v_proj.lora_B.weight; is the base model right"):
        load(str(folder))


def test_peft_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UserError, match=r"is an adapter, which PEFT merges .* type `pip install 'vlm-sensitivity\[adapters\]'`"
    ):
        load(str(folder))


def test_spread_over_what_there_is_and_in_every_type_of_number(base: Path) -> None:
    whole, spread = load(str(base)), load(str(base), device="auto", dtype="bf16")
    assert spread.model.dtype == torch.bfloat16
    assert spread.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.equal(weight(spread, 1, "q_proj").float(), weight(whole, 1, "q_proj").bfloat16().float())
    assert load(str(base), dtype="fp16").model.dtype == torch.float16


def test_what_accelerate_hangs_on_blocks_outlives_a_sweep(base: Path, tmp_path: Path) -> None:
    """A spread model's blocks fetch their inputs from other devices; replaying hidden states must not undo that."""
    vlm, calls = load(str(base)), []

    class Fetch(accelerate.hooks.ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    blocks = [*vlm.model.model.vision_tower.encoder.layers, *vlm.model.model.language_model.layers]
    for block in blocks:
        accelerate.hooks.add_hook_to_module(block, Fetch())
    parts = inspect(vlm, by="part")
    plans = [Plan.uniform(parts, scheme("rtn", bits)) for bits in (3, 4)]
    study = sweep(vlm, parts, plans, ["vqa"], tmp_path / "hooked", n=3)
    calls.clear()
    evaluate(vlm, task("vqa", n=3))
    assert set(calls) == set(blocks)
    plain = sweep(load(str(base)), parts, plans, ["vqa"], tmp_path / "plain", n=3, plain=True)
    assert study.table()["vqa"].tolist() == plain.table()["vqa"].tolist()


def test_spreading_without_accelerate(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sensitivity.models.loading.is_accelerate_available", lambda: False)
    with pytest.raises(UserError, match="spreads a model over devices with accelerate; type `pip install accelerate`"):
        load(str(base), device="auto")
