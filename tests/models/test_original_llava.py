"""A checkpoint in LLaVA's original layout becomes the same model as one built directly; what is amiss is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import saved_vlms
import small_vlms as small
import torch
import transformers as T
from safetensors.torch import save_file
from torch import Tensor

from sensitivity.measure.evaluation import evaluate
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.original_llava import interpolated
from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.types import Example, Task, exact

OLD = {
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.language_model.": "model.",
}
SIDE = 504  # what GeoChat's positions are stretched to


def built() -> Any:
    """A small GeoChat, as transformers builds it: 6 x 6 patches of 84 pixels; the last word is the image's."""
    torch.manual_seed(0)
    words = len(saved_vlms.words())
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**{**small.VIT, "image_size": SIDE, "patch_size": 84}),
        text_config=T.LlamaConfig(**{**small.LLAMA, "vocab_size": words + 1, "max_position_embeddings": 256}),
        image_token_index=words, image_seq_length=36, tie_word_embeddings=False,
    )  # fmt: skip
    model = T.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    for head in (model.get_input_embeddings(), model.get_output_embeddings()):
        head.weight.data[-1] = head.weight.data[0]  # as for a word that the checkpoint does not know
    return model


def old_name(key: str) -> str:
    return next((old + key.removeprefix(new) for new, old in OLD.items() if key.startswith(new)), key)


def original(model: Any) -> dict[str, Tensor]:
    """The tensors under the names of LLaVA's own code, without the image's word."""
    tensors = {old_name(key): value.contiguous() for key, value in model.state_dict().items()}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key][:-1].contiguous()
    return tensors


def written(folder: Path, tensors: dict[str, Tensor], model: Any) -> Path:
    """The folder as it is published: one flat config.json, the tower named, a tokenizer, and no processor."""
    folder.mkdir()
    tower = folder.parent / "tower"
    model.config.vision_config.save_pretrained(tower)
    text = {key: getattr(model.config.text_config, key) for key in small.LLAMA}
    config = {
        **text, "vocab_size": model.config.image_token_index, "model_type": "geochat", "torch_dtype": "float32",
        "architectures": ["GeoChatLlamaForCausalLM"], "mm_vision_tower": str(tower), "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 16,
        "rope_scaling": None, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    save_words(folder)
    return folder


def save_words(folder: Path, **more: str) -> None:
    """A tokenizer that does not know <image>, as Vicuna's."""
    saved_vlms.words(**more).save_pretrained(folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"<image>"', '"<unused>"'))


@pytest.fixture(scope="module")
def direct() -> Any:
    return built()


@pytest.fixture
def folder(tmp_path: Path, direct: Any) -> Path:
    return written(tmp_path / "geochat-7B", original(direct), direct)


def logits(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 150, (2, 8), generator=generator)
    ids = torch.cat([torch.full((2, 36), model.config.image_token_index), words], 1)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits  # type: ignore[no-any-return]


def test_the_converted_model_is_the_one_that_was_built(folder: Path, direct: Any) -> None:
    vlm = load(str(folder))
    assert vlm.family.label == "GeoChat"
    assert torch.equal(logits(vlm.model), logits(direct))
    assert inspect(str(folder)).weights == inspect(vlm).weights


def test_as_published_in_pickles_and_without_the_frozen_tower(folder: Path, direct: Any) -> None:
    tower = saved_vlms.in_pickles(folder, without="vision_tower")
    clip = {key.partition("vision_tower.vision_tower.")[2]: value for key, value in tower.items()}
    save_file({**clip, "text_model.stranger": torch.zeros(1)}, folder.parent / "tower" / "model.safetensors")
    assert torch.equal(logits(load(str(folder)).model), logits(direct))
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"no zip file")
    with pytest.raises(UserError, match=r"pytorch_model-00001-of-00002.bin of .* cannot be read as weights alone"):
        load(str(folder))
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"lacks pytorch_model-00002-of-00002.bin, which its index names"):
        load(str(folder))
    (folder / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(UserError, match=r"has no weights here; .* type `hf download NAME --local-dir FOLDER`"):
        load(str(folder))


def test_positions_of_a_smaller_tower_are_stretched_corner_to_corner() -> None:
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    flat = torch.stack([x, y], -1).flatten(0, 1)
    stretched = interpolated(torch.cat([torch.tensor([[7.0, 9.0]]), flat]), 36)
    assert stretched.shape == (1 + 1296, 2)
    assert stretched[0].tolist() == [7.0, 9.0]
    corners = stretched[1:].reshape(36, 36, 2)[[0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, torch.tensor([[0.0, 0.0], [23.0, 0.0], [0.0, 23.0], [23.0, 23.0]]))


def test_a_checkpoint_with_the_towers_own_positions(folder: Path, direct: Any) -> None:
    tensors = original(direct)
    key = "model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"
    tensors[key] = tensors[key][: 1 + 16].clone()  # 4 x 4
    save_file(tensors, folder / "model.safetensors")
    model = load(str(folder)).model
    weight = model.model.vision_tower.embeddings.position_embedding.weight
    assert torch.equal(weight, interpolated(tensors[key], 6))


def test_asked_as_geochat_is(folder: Path) -> None:
    vlm = load(str(folder))
    picture = torch.randint(0, 255, (40, 30, 3), dtype=torch.uint8).numpy()
    words = ("[refer] where is the 3?", "[grounding]the 3", "[identify] what is {<1><2><3><4>|<0>}")
    asked = tuple(Example(word, "one", "kind", picture, word, ("three",)) for word in words)
    task = Task("boxes", asked, exact, max_new_tokens=3)
    rows = evaluate(vlm, task)
    assert len(rows["answer"]) == 3
    assert rows["answer"] == evaluate(vlm, task, plain=True)["answer"]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words[0]}]}]
    assert vlm.processor.apply_chat_template(chat, add_generation_prompt=True) == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: <image>\n[refer] where is the 3? ASSISTANT:"
    )


def forget(tensors: dict[str, Tensor]) -> None:
    del tensors["model.mm_projector.2.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.image_newline"] = torch.zeros(24)


def misshape(tensors: dict[str, Tensor]) -> None:
    tensors["model.mm_projector.0.weight"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (forget, r"lacks tensors for Llava.*: model.multi_modal_projector.linear_2.weight"),
        (add, r"has unknown tensors for Llava.*: model.image_newline"),
        (misshape, r"of another shape .*: model.multi_modal_projector.linear_1.weight"),
    ],
)
def test_tensors_without_a_place_are_named(
    folder: Path, direct: Any, harm: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = original(direct)
    harm(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load(str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mm_projector_type": "linear"}, r"has the projector 'linear' .* only mlp2x_gelu"),
        ({"mm_vision_tower": "./no/such/tower"}, r"names the vision tower ./no/such/tower .* cannot be read"),
        ({"vocab_size": 150}, r"the checkpoint of .* of another shape than its config says"),
    ],
)
def test_configurations_that_do_not_fit_are_named(folder: Path, values: dict[str, Any], message: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with pytest.raises(UserError, match=message):
        load(str(folder))


def test_a_tokenizer_of_another_size_is_named(folder: Path) -> None:
    save_words(folder, strange_token="<strange>")
    with pytest.raises(UserError, match=r"has 165 tokens and its config.json 164 \(vocab_size\)"):
        load(str(folder))
