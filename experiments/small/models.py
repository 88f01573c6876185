"""Small random models of the families of the published studies, saved as folders with weights, config and processor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T
from safetensors.torch import save_file
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

from sensitivity.models.checkpoint import model_folder

SIDE, WORDS, BLOCKS = 16, 256, 3
SQUARE = {"height": SIDE, "width": SIDE}
COMMON: dict[str, Any] = {"num_hidden_layers": BLOCKS, "num_attention_heads": 2}
VIT: dict[str, Any] = {**COMMON, "hidden_size": 16, "intermediate_size": 32, "image_size": SIDE, "patch_size": 8}
SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT: dict[str, Any] = {**COMMON, **SPECIALS, "vocab_size": WORDS, "hidden_size": 24, "max_position_embeddings": 512}


def words() -> Any:
    """The embedded model's tokenizer."""
    return T.AutoTokenizer.from_pretrained(model_folder("embedded:scenes-llava"), local_files_only=True)


def llava(times: int = 1, side: int = SIDE) -> tuple[Any, Any]:
    """A LLaVA `times` as wide, for square images of `side` pixels."""
    tokenizer = words()
    vision = {**VIT, "hidden_size": 16 * times, "intermediate_size": 32 * times, "image_size": side}
    text = {**TEXT, "hidden_size": 24 * times, "intermediate_size": 40 * times, "head_dim": 12 * times}
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**vision),
        text_config=T.LlamaConfig(**text, num_key_value_heads=1),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = T.LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return T.LlavaForConditionalGeneration(config), processor


def blip2_config(**more: Any) -> tuple[Any, Any]:
    tokenizer = words()
    config = T.Blip2Config(
        vision_config=VIT,
        qformer_config={**COMMON, "hidden_size": 16, "intermediate_size": 32, "encoder_hidden_size": 16,
                        "vocab_size": WORDS, **more},
        text_config={"model_type": "opt", **TEXT, "word_embed_proj_dim": 24, "ffn_dim": 40},
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return config, T.Blip2Processor(BlipImageProcessorPil(size=SQUARE), tokenizer, num_query_tokens=4)


def blip2() -> tuple[Any, Any]:
    config, processor = blip2_config()
    return T.Blip2ForConditionalGeneration(config), processor


def blip2_retrieval() -> tuple[Any, Any]:
    config, processor = blip2_config(use_qformer_text_input=True)
    return T.Blip2ForImageTextRetrieval(config), processor


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "llava-wide": lambda: llava(20, 96),
    "blip2": blip2,
    "blip2-retrieval": blip2_retrieval,
}


def save(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    if name == "geochat":
        return geochat(folder)
    model, processor = BUILDERS[name]()
    shaken(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def shaken(model: Any) -> Any:
    """Random weights everywhere, since some families start at zero, and a likely end token, so that answers end."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    if (head := model.get_output_embeddings()) is not None:
        head.weight.data[SPECIALS["eos_token_id"]] *= 5
    return model


# transformers' names -> those of the original LLaVA repository
OLD = {
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.language_model.": "model.",
}
PIXELS, PATCH = 504, 84  # GeoChat's image size, in few patches


def geochat(folder: Path) -> Path:
    """A folder like the published GeoChat: the original LLaVA layout, a flat config.json, no image token."""
    tokenizer = words()
    vision = T.CLIPVisionConfig(**{**VIT, "image_size": PIXELS, "patch_size": PATCH})
    text = {**TEXT, "vocab_size": len(tokenizer), "intermediate_size": 40, "num_key_value_heads": 1, "head_dim": 12}
    config = T.LlavaConfig(vision_config=vision, text_config=T.LlamaConfig(**text), tie_word_embeddings=False)
    tensors = {}
    for key, value in shaken(T.LlavaForConditionalGeneration(config)).state_dict().items():
        new = next((one for one in OLD if key.startswith(one)), "")
        tensors[OLD.get(new, "") + key.removeprefix(new)] = value.bfloat16().contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    vision.save_pretrained(folder / "tower")
    about = {
        "model_type": "geochat", "architectures": ["GeoChatLlamaForCausalLM"], "torch_dtype": "bfloat16",
        "mm_vision_tower": str(folder / "tower"), "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": VIT["hidden_size"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**text, **about}))
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"<image>"', '"<unused>"'))
    return folder
