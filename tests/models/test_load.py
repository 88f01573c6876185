"""Loading a model: what is read, what is refused and in which words, and outliers that change no answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_vlms as small
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sensitivity.models.checkpoint import EMBEDDED_MODELS
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.outliers import NOTE, plant_outliers
from sensitivity.spec.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    torch.manual_seed(0)
    small.llava().half().save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny-llava"))


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_folder(saved: Path) -> None:
    vlm = load(str(saved))
    assert type(vlm.model).__name__ == "LlavaForConditionalGeneration"
    assert (vlm.native_bits, vlm.model.dtype, vlm.processor) == (16, torch.float16, None)
    assert vlm.note == "without effect: the last 1 of the vision blocks, since vision_feature_layer is -2"
    assert not vlm.model.training
    assert not any(p.requires_grad for p in vlm.model.parameters())
    assert load(str(saved), dtype="float32").model.dtype == torch.float32
    assert vlm.family.label == "LLaVA"


def test_a_config_is_enough_to_inspect(saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "config.json", tmp_path)
    vlm = load(str(tmp_path), config_only=True)
    assert vlm.device.type == "meta"
    alone, whole = inspect(vlm, "part"), inspect(load(str(saved)), "part")
    assert (alone.weights, alone.kept, alone.native_bits) == (whole.weights, whole.kept, 16)
    assert inspect(str(tmp_path)).names[0] == "vision.front.attn"


def test_native_bits_are_those_of_the_file(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({name: t.float() for name, t in tensors.items()}))
    assert load(str(folder)).native_bits == 32
    edit_config(folder, dtype="float32")
    assert load(str(folder), config_only=True).native_bits == 32


def test_the_fingerprint_knows_the_weights_and_not_the_place(saved: Path, folder: Path) -> None:
    before = load(str(saved)).fingerprint
    assert load(str(folder)).fingerprint == before
    edit_config(folder, transformers_version="5.99")
    assert load(str(folder)).fingerprint == before
    edit_weights(folder, lambda tensors: tensors["language_model.lm_head.weight"][0, 0].add_(1))
    assert load(str(folder)).fingerprint != before


def test_a_class_that_only_the_config_names(folder: Path) -> None:
    edit_config(folder, architectures=["NoSuchClass"])
    assert type(load(str(folder)).model).__name__ == "LlavaForConditionalGeneration"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "embedded:scene",
            r"unknown embedded model 'embedded:scene'; choose from embedded:scenes-llava, .*did you mean",
        ),
        ("./nowhere/at/all", r"there is no folder './nowhere/at/all'; give a folder .* or embedded:scenes-llava"),
        (__file__, r"is a file; give the folder it lies in"),
    ],
)
def test_no_such_model(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(name)


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'org/model' is neither a folder here nor a model that can be down") as caught:
        load("org/model")
    assert "\n" not in str(caught.value)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def corrupt_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llava",')


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def missing_shard(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def nan_weight(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors["language_model.model.norm.weight"][3].fill_(float("nan")))


def extra_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.stranger.weight": torch.zeros(2)}))


def missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.__delitem__("multi_modal_projector.linear_2.weight"))


def wrong_shape(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"multi_modal_projector.linear_1.weight": torch.zeros(2, 2)}))


def remote_code(folder: Path) -> None:
    edit_config(folder, model_type="secret_vlm", auto_map={"AutoModel": "modeling_secret.SecretVLM"})


def unknown_type(folder: Path) -> None:
    edit_config(folder, model_type="secret_vlm")


def unfit_config(folder: Path) -> None:
    edit_config(folder, text_config={"model_type": "llama", "num_hidden_layers": "many"})


def quantized(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (no_config, r"has no config.json; give a folder that has one"),
        (corrupt_config, r"config.json of .* is not JSON \(.*line 1"),
        (only_pickles, r"only as pickles \(pytorch_model.bin\), which can run code .* save the model as safetensors"),
        (no_weights, r"has no model.safetensors; fetch the weights, or inspect it with --config-only"),
        (missing_shard, r"lacks model-00002-of-00002.safetensors, which its index names"),
        (cut_short, r"model.safetensors is not a complete safetensors file \(.*not fully covered\); fetch it again"),
        (nan_weight, r"has NaN or infinite weights in model.language_model.norm.weight"),
        (extra_tensor, r"has unknown tensors for LlavaForConditionalGeneration: model.stranger.weight"),
        (missing_tensor, r"lacks tensors for .*: model.multi_modal_projector.linear_2.weight"),
        (
            wrong_shape,
            r"has tensors for .* of another shape than its config says: model.multi_modal_projector.linear_1.weight",
        ),
        (remote_code, r"needs code of its own \(trust_remote_code\), which is never run here"),
        (unknown_type, r"model_type 'secret_vlm' of .* is not known to transformers .* families are llava"),
        (unfit_config, r"config.json of .* does not fit its model_type"),
        (quantized, r"is already quantized \(awq\); give the model it was made from"),
    ],
)
def test_what_is_refused(folder: Path, harm: Callable[[Path], None], message: str) -> None:
    harm(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "message"), [({"dtype": "int4"}, "unknown dtype"), ({"device": "abacus"}, "device 'abacus'")]
)
def test_settings_are_checked_before_anything_is_read(how: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("./nowhere/at/all", **how)  # type: ignore[arg-type]


# -- synthetic outliers


def loudness(model: nn.Module) -> float:
    """How far the largest weight of a block's linears lies out, in standard deviations; the mean over the linears."""
    weights = [m.weight.detach() for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in name]
    return sum((w.abs().max() / w.std()).item() for w in weights) / len(weights)


def test_outliers_change_weights_and_no_answer() -> None:
    torch.manual_seed(0)
    wide = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = small.llava(wide, vision_feature_layer=-1).double().eval()
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:  # fresh biases are zero and fresh gains one, where anything would pass
            nn.init.normal_(parameter, 1.0, 0.3)
    projector = {name: p.clone() for name, p in model.named_parameters() if "projector" in name}
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    words = torch.cat([torch.full((2, 4), 95), torch.randint(3, 90, (2, 6))], 1)

    def answer() -> Tensor:
        with torch.no_grad():
            return model(input_ids=words, pixel_values=pixels).logits  # type: ignore[no-any-return]

    before, quiet = answer(), loudness(model)
    plant_outliers(model)
    assert float((answer() - before).norm() / before.norm()) < 1e-4
    assert loudness(model) > 1.5 * quiet
    assert all(torch.equal(p, projector[name]) for name, p in model.named_parameters() if "projector" in name)


def test_outliers_are_the_same_each_time_and_only_for_known_blocks() -> None:
    torch.manual_seed(0)
    first = small.llava()
    second = small.llava()
    second.load_state_dict(first.state_dict())
    plant_outliers(first)
    plant_outliers(second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(UserError, match="no LLaVA-type blocks"):
        plant_outliers(nn.Linear(2, 2))


@pytest.mark.skipif(not (EMBEDDED_MODELS / "scenes-llava" / "config.json").exists(), reason="no embedded model yet")
def test_the_embedded_model_and_its_heavy_twin() -> None:
    plain, loud = load("embedded:scenes-llava"), load("embedded:scenes-llava-heavy")
    assert (plain.note, loud.note) == (None, NOTE)
    assert plain.fingerprint != loud.fingerprint
    assert (plain.model.dtype, plain.native_bits, loud.native_bits) == (torch.float32, 16, 16)
    assert isinstance(plain.processor, T.ProcessorMixin)
    assert loudness(loud.model) > 3 * loudness(plain.model)
    assert inspect(plain).weights == inspect(loud).weights == inspect("embedded:scenes-llava-heavy").weights
