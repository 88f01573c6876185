"""The names that llama.cpp gives to a model's tensors, and a check of whether it can run the model."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from sensitivity.formats.halved.halves import LANGUAGE, VISION
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError

# config.model_type -> llama.cpp's name of the projector between vision tower and language model
PROJECTORS = {"llava": "mlp", "idefics3": "idefics3", "smolvlm": "idefics3"}
PROJECTORS |= {"qwen2_vl": "qwen2vl_merger", "qwen2_5_vl": "qwen2.5vl_merger"}
TILED = ("idefics3", "smolvlm")  # types whose processor cuts an image into tiles
# model_type of the language model -> llama.cpp's name of its architecture
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen2_vl_text": "qwen2vl", "qwen2_5_vl_text": "qwen2vl"}
QWEN = ("qwen2_vl", "qwen2_5_vl")  # types whose images have any size, and positions by row and column
CLIP = "clip_vision_model"
# vision tower of LLaVA -> the features that llama.cpp's graph selects
TOWERS = {CLIP: "default", "siglip_vision_model": "full"}
# hidden_act of a vision tower -> llama.cpp's function for it; llama.cpp computes the exact GELU by its tanh form
ACTS = {"quick_gelu": "quick", "gelu": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "silu": "silu"}

TEXT_BLOCK = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TEXT = {"embed_tokens": "token_embd", "norm": "output_norm"}
VIT_BLOCK = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
    "layer_norm1": "ln1", "layer_norm2": "ln2",
}  # fmt: skip
VIT = {
    "embeddings.class_embedding": "v.class_embd", "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd", "pre_layrnorm": "v.pre_ln", "post_layernorm": "v.post_ln",
}  # fmt: skip
QWEN_BLOCK = {
    "attn.proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "norm1": "ln1", "norm2": "ln2",
}  # fmt: skip
QWEN_VIT = {
    "patch_embed.proj": "v.patch_embd", "merger.ln_q": "v.post_ln", "merger.mlp.0": "mm.0", "merger.mlp.2": "mm.2",
}  # fmt: skip
WINDOW = 112  # pixels of an attention window in Qwen2.5-VL's tower: llama.cpp takes no other
# start of a parameter's path -> which file, the prefix of names in a block, and the names inside and outside of blocks
ROOTS: dict[str, tuple[str, str, dict[str, str], dict[str, str]]] = {
    "model.language_model.": (LANGUAGE, "blk", TEXT_BLOCK, TEXT),
    "model.text_model.": (LANGUAGE, "blk", TEXT_BLOCK, TEXT),
    "model.vision_tower.vision_model.": (VISION, "v.blk", VIT_BLOCK, VIT),
    "model.vision_tower.": (VISION, "v.blk", VIT_BLOCK, VIT),
    "model.vision_model.": (VISION, "v.blk", VIT_BLOCK, VIT),
    "model.visual.": (VISION, "v.blk", QWEN_BLOCK, QWEN_VIT),
    "model.multi_modal_projector.": (VISION, "", {}, {"linear_1": "mm.0", "linear_2": "mm.2"}),
    "model.connector.": (VISION, "", {}, {"modality_projection.proj": "mm.model.fc"}),
    "": (LANGUAGE, "", {}, {"lm_head": "output"}),
}
IN_BLOCK = re.compile(r"(?:encoder\.)?(?:layers|blocks)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Placed:
    """A tensor of a GGUF file: its name and shape, and which part of a parameter it is."""

    name: str
    shape: tuple[int, ...]
    rows: Tensor | None = None  # indices of the parameter's rows, in the order of the file; None: all rows as they are
    frame: int | None = None  # which frame of a convolution over time

    def of(self, values: Tensor) -> Tensor:
        """The tensor's values, from those of the parameter."""
        if self.frame is not None:
            return values[:, :, self.frame]
        return values if self.rows is None else values[self.rows]


def placed(config: PreTrainedConfig, parameter: str, shape: tuple[int, ...]) -> tuple[str, tuple[Placed, ...]]:
    """The file of a parameter and the tensors that it becomes there: none if the model never reads it."""
    root = next(root for root in ROOTS if parameter.startswith(root))
    half, blocks, inside, outside = ROOTS[root]
    path, _, leaf = parameter[len(root) :].rpartition(".")
    if leaf not in ("weight", "bias"):
        path, leaf = f"{path}.{leaf}", ""
    if half == VISION and _never_read(config, path):
        return half, ()
    found = IN_BLOCK.fullmatch(path)
    prefix, names, place = (f"{blocks}.{found[1]}.", inside, found[2]) if found else ("", outside, path)
    suffix = f".{leaf}" if leaf else ""
    if place == "attn.qkv":  # llama.cpp reads three weights instead of one
        each = shape[0] // 3
        rows = torch.split(torch.arange(shape[0]), each)
        kept = (each, *shape[1:])
        return half, tuple(Placed(f"{prefix}attn_{n}{suffix}", kept, r) for n, r in zip("qkv", rows, strict=True))
    if place not in names:
        raise UserError(f"llama.cpp has no name for {parameter}; use --format compressed-tensors, or openvino")
    name = f"{prefix}{names[place]}{suffix}"
    if len(shape) == 5:  # a convolution over two frames is two convolutions, whose outputs are added
        still = (*shape[:2], *shape[3:])
        return half, tuple(Placed(f"{name}{end}", still, frame=i) for i, end in enumerate(("", ".1")))
    return half, (Placed(name, shape, _order(config, names[place], shape[0]) if half == LANGUAGE else None),)


def _order(config: PreTrainedConfig, name: str, rows: int) -> Tensor | None:
    """The order of a query's or key's rows, since llama.cpp's rotary positions rotate pairs of neighboring rows.

    In transformers, the rows of a pair are in the two halves of a head.
    """
    text = config.get_text_config()
    if ARCHITECTURES[text.model_type] != "llama" or name not in ("attn_q", "attn_k"):
        return None
    heads = text.num_attention_heads if name == "attn_q" else text.num_key_value_heads
    return torch.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def depth(config: PreTrainedConfig) -> int:
    """How many blocks of the vision tower are read."""
    vision = config.vision_config
    blocks = int(vision.depth if config.model_type in QWEN else vision.num_hidden_layers)
    if config.model_type != "llava":
        return blocks
    layer = int(config.vision_feature_layer)
    return layer if layer >= 0 else blocks + 1 + layer


def _never_read(config: PreTrainedConfig, path: str) -> bool:
    """Whether a LLaVA model never reads a module of its tower: one after the layer that it uses, or for pooling."""
    if config.model_type != "llava":
        return False
    found = IN_BLOCK.fullmatch(path)
    return int(found[1]) >= depth(config) if found else path.split(".")[0] in ("post_layernorm", "head")


def check_named(vlm: VLM) -> None:
    """Raise an error for a model that llama.cpp computes in another way than transformers, or not at all."""
    config = vlm.model.config
    text = config.get_text_config()
    if config.model_type not in PROJECTORS or text.model_type not in ARCHITECTURES:
        known, languages = ", ".join(PROJECTORS), ", ".join(ARCHITECTURES)
        raise UserError(
            f"only models of the types {known} with a language model of the types {languages} can be written as GGUF, "
            f"and {vlm.name} is of type {config.model_type} with {text.model_type}"
        )
    vision, rope = config.vision_config, dict(text.rope_parameters or {})
    wrong = {
        f"hidden_act {text.hidden_act} in its language model": text.hidden_act != "silu",
        f"hidden_act {vision.hidden_act} in its vision tower": vision.hidden_act not in ACTS,
        f"{rope.get('rope_type')} rotary positions": rope.get("rope_type") not in ("default", "linear", "mrope"),
        "biases in its language model": getattr(text, "mlp_bias", False) or getattr(text, "attention_bias", False),
        "attention in a sliding window": bool(getattr(text, "use_sliding_window", False)),
    }
    if config.model_type == "llava":
        wrong |= _wrong_in_llava(config)
    if config.model_type == "qwen2_5_vl":
        wrong |= {
            f"windows of {vision.window_size} pixels": vision.window_size != WINDOW,
            "full attention in irregular blocks": not full_attention_every(vision),
        }
    if found := [what for what, is_so in wrong.items() if is_so]:
        raise UserError(f"{vlm.name} has {' and '.join(found)}, which llama.cpp does not compute; use another format")
    for name, parameter in vlm.model.named_parameters():
        placed(config, name, tuple(parameter.shape))  # raises an error for one without a name


def full_attention_every(vision: PreTrainedConfig) -> int:
    """Every how many blocks Qwen2.5-VL's tower has full attention, without windows; 0 if that is irregular."""
    blocks = list(vision.fullatt_block_indexes)
    step = blocks[0] + 1 if blocks else 0
    return step if blocks == list(range(step - 1, blocks[-1] + 1, step)) else 0


def _wrong_in_llava(config: PreTrainedConfig) -> dict[str, bool]:
    tower, chosen = config.vision_config.model_type, config.vision_feature_select_strategy
    return {
        f"a vision tower of type {tower}": tower not in TOWERS,
        f"features selected as {chosen} of {tower}": TOWERS.get(tower, chosen) != chosen,
        "features of several vision layers": not isinstance(config.vision_feature_layer, int),
        f"{config.projector_hidden_act} in its projector": config.projector_hidden_act != "gelu",
    }
