"""The settings in the header of each GGUF file, from a model's configuration and processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedConfig

from sensitivity.formats.gguf.names import ACTS, ARCHITECTURES, PROJECTORS, QWEN, depth, full_attention_every
from sensitivity.models.vlm import VLM

if TYPE_CHECKING:
    from gguf import GGUFWriter


def language_writer(config: PreTrainedConfig) -> GGUFWriter:
    """A writer with the settings of the language model."""
    from gguf import GGUFWriter

    text = config.get_text_config()
    writer = GGUFWriter(None, ARCHITECTURES[text.model_type])
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    writer.add_rope_dimension_count(head)
    rope = dict(text.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if sections := rope.get("mrope_section"):
        writer.add_rope_dimension_sections([*sections, 0][:4])
    writer.add_quantization_version(2)
    return writer


def vision_writer(vlm: VLM) -> GGUFWriter:
    """A writer with the settings of the vision tower and of the projector."""
    from gguf import GGUFType, GGUFWriter

    config, processor = vlm.model.config, vlm.processor.image_processor
    vision, kind = config.vision_config, config.model_type
    qwen = kind in QWEN
    width = vision.embed_dim if kind == "qwen2_vl" else vision.hidden_size
    inner = width * vision.mlp_ratio if kind == "qwen2_vl" else vision.intermediate_size
    writer = GGUFWriter(None, "clip")
    writer.add_type(GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(PROJECTORS[kind])
    writer.add_vision_projection_dim(config.get_text_config().hidden_size)
    writer.add_vision_image_size(560 if qwen else vision.image_size)  # Qwen takes images of any size
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(width)
    writer.add_vision_feed_forward_length(int(inner))
    writer.add_vision_block_count(depth(config))
    writer.add_vision_head_count(vision.num_heads if qwen else vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(1e-6 if qwen else vision.layer_norm_eps)
    writer.add_vision_image_mean(list(processor.image_mean))
    writer.add_vision_image_std(list(processor.image_std))
    writer.add_vision_use_gelu(ACTS[vision.hidden_act] == "gelu")
    writer.add_vision_use_silu(ACTS[vision.hidden_act] == "silu")
    _family_settings(writer, kind, config, dict(processor.size))
    return writer


def _family_settings(writer: GGUFWriter, kind: str, config: PreTrainedConfig, size: dict[str, int]) -> None:
    """Settings that only one kind of projector has."""
    if kind == "llava":
        writer.add_array("clip.vision.feature_layer", [depth(config)])
    elif kind in QWEN:
        if kind == "qwen2_5_vl":
            writer.add_vision_n_wa_pattern(full_attention_every(config.vision_config))
        writer.add_vision_spatial_merge_size(config.vision_config.spatial_merge_size)
        writer.add_uint32("clip.vision.image_min_pixels", size["shortest_edge"])
        writer.add_uint32("clip.vision.image_max_pixels", size["longest_edge"])
    else:
        writer.add_vision_projector_scale_factor(config.scale_factor)
        writer.add_vision_preproc_image_size(size["longest_edge"])
