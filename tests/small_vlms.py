"""Small configurations of every supported VLM class, to be built on the meta device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as T
from torch import nn

BLOCKS = 5  # enough for unequal thirds: 1, 2, 2
SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 64,
    **SPECIALS,
}
VICUNA_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
}
VIT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QFORMER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "encoder_hidden_size": 16,
}
OPT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 24,
    "word_embed_proj_dim": 24,
    "ffn_dim": 40,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
T5: dict[str, Any] = {"vocab_size": 96, "d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 3, "num_heads": 2}
T5["num_decoder_layers"] = 4
T5["feed_forward_proj"] = "gated-gelu"
ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}


def llava(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **more: Any) -> nn.Module:
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**{**VIT, **(vision or {})}),
        text_config=T.LlamaConfig(**{**LLAMA, **(text or {})}),
        image_token_index=95,
        **more,
    )
    return T.LlavaForConditionalGeneration(config)


def llava_next() -> nn.Module:
    grid = [[16, 32], [32, 16]]
    config = T.LlavaNextConfig(
        vision_config=T.CLIPVisionConfig(**VIT), text_config=T.LlamaConfig(**LLAMA), image_grid_pinpoints=grid
    )
    return T.LlavaNextForConditionalGeneration(config)


def llava_onevision() -> nn.Module:
    config = T.LlavaOnevisionConfig(
        vision_config=T.SiglipVisionConfig(**VIT, vision_use_head=False), text_config=T.Qwen2Config(**LLAMA)
    )
    return T.LlavaOnevisionForConditionalGeneration(config)


def blip2_opt() -> nn.Module:
    config = T.Blip2Config(vision_config=VIT, qformer_config=QFORMER, text_config={"model_type": "opt", **OPT})
    return T.Blip2ForConditionalGeneration(config)


def blip2_t5() -> nn.Module:
    config = T.Blip2Config(vision_config=VIT, qformer_config=QFORMER, text_config={"model_type": "t5", **T5})
    return T.Blip2ForConditionalGeneration(config)


def blip2_retrieval() -> nn.Module:
    qformer = {**QFORMER, "use_qformer_text_input": True}
    config = T.Blip2Config(vision_config=VIT, qformer_config=qformer, text_config={"model_type": "opt", **OPT})
    return T.Blip2ForImageTextRetrieval(config)


def instructblip() -> nn.Module:
    text = {"model_type": "llama", **LLAMA}
    config = T.InstructBlipConfig(vision_config=VIT, qformer_config=QFORMER, text_config=text)
    return T.InstructBlipForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    vision = {"depth": BLOCKS, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = T.Qwen2VLConfig(text_config={**LLAMA, "rope_parameters": ROPE}, vision_config=vision)
    return T.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    vision = {"depth": BLOCKS, "hidden_size": 16, "out_hidden_size": 24, "num_heads": 2, "intermediate_size": 32}
    config = T.Qwen2_5_VLConfig(text_config={**LLAMA, "rope_parameters": ROPE}, vision_config=vision)
    return T.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> nn.Module:
    vision = {"depth": BLOCKS, "hidden_size": 16, "out_hidden_size": 24, "num_heads": 2, "intermediate_size": 32}
    vision["deepstack_visual_indexes"] = [1, 3]
    config = T.Qwen3VLConfig(text_config={**LLAMA, "rope_parameters": ROPE}, vision_config=vision)
    return T.Qwen3VLForConditionalGeneration(config)


def internvl() -> nn.Module:
    vision = {**VIT, "image_size": [16, 16], "patch_size": [8, 8]}
    config = T.InternVLConfig(vision_config=vision, text_config={"model_type": "qwen2", **LLAMA})
    return T.InternVLForConditionalGeneration(config)


def idefics3() -> nn.Module:
    config = T.Idefics3Config(vision_config=VIT, text_config={"model_type": "llama", **LLAMA})
    return T.Idefics3ForConditionalGeneration(config)


def smolvlm() -> nn.Module:
    config = T.SmolVLMConfig(vision_config=VIT, text_config={"model_type": "llama", **LLAMA})
    return T.SmolVLMForConditionalGeneration(config)


def paligemma() -> nn.Module:
    vision = {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False}
    config = T.PaliGemmaConfig(vision_config=vision, text_config={"model_type": "gemma", **LLAMA}, projection_dim=24)
    return T.PaliGemmaForConditionalGeneration(config)


def gemma3() -> nn.Module:
    vision = {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False}
    config = T.Gemma3Config(vision_config=vision, text_config=LLAMA, mm_tokens_per_image=4)
    return T.Gemma3ForConditionalGeneration(config)


def mllama() -> nn.Module:
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_global_layers": 2}
    vision |= {"attention_heads": 2, "image_size": 16, "patch_size": 8, "intermediate_layers_indices": [1, 2]}
    vision |= {"vision_output_dim": 48}
    text = {**LLAMA, "num_hidden_layers": 7, "cross_attention_layers": [2, 5]}
    return T.MllamaForConditionalGeneration(T.MllamaConfig(vision_config=vision, text_config=text))


def kosmos2() -> nn.Module:
    text = {"vocab_size": 96, "embed_dim": 24, "ffn_dim": 40, "layers": BLOCKS, "attention_heads": 2}
    config = T.Kosmos2Config(vision_config=VIT, text_config=text, latent_query_num=4)
    return T.Kosmos2ForConditionalGeneration(config)


def florence2() -> nn.Module:
    vision = {"embed_dim": [16, 16, 16, 16], "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1, 1, 2, 1]}
    text = {"model_type": "bart", "vocab_size": 96, "d_model": 24, "encoder_layers": 3, "decoder_layers": 3}
    text |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    text |= {f"{side}_ffn_dim": 40 for side in ("encoder", "decoder")}
    config = T.Florence2Config(vision_config={**vision, "projection_dim": 24}, text_config=text)
    return T.Florence2ForConditionalGeneration(config)


def clip() -> nn.Module:
    text = {**VIT, "vocab_size": 96, "max_position_embeddings": 16, **SPECIALS}
    return T.CLIPModel(T.CLIPConfig(vision_config=VIT, text_config=text, projection_dim=16))


def siglip() -> nn.Module:
    text = {**VIT, "vocab_size": 96, "max_position_embeddings": 16, **SPECIALS}
    return T.SiglipModel(T.SiglipConfig(vision_config=VIT, text_config=text))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f
    for f in (
        llava, llava_next, llava_onevision, blip2_opt, blip2_t5, blip2_retrieval, instructblip, qwen2_vl, qwen2_5_vl,
        qwen3_vl, internvl, idefics3, smolvlm, paligemma, gemma3, mllama, kosmos2, florence2, clip, siglip,
    )
}  # fmt: skip


@functools.cache
def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return BUILDERS[name]()
