"""Reads checkpoints in LLaVA's original layout (GeoChat's, too) as LlavaForConditionalGeneration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sensitivity.models.checkpoint import header, json_object, model_folder, shards_of, weight_files
from sensitivity.models.families import Family
from sensitivity.spec.errors import UserError, reason
from sensitivity.spec.fields import FILE, MISSING, OBJECT, InvalidValue, Kind, check, not_a_file

IMAGE_SIZES = {"geochat": 504}  # pixels of the input; other models keep the size of their tower
TOWERS = {  # towers whose config need not be fetched; their weights may be in the checkpoint
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip
Config = Mapping[str, Any]  # fields of a config.json; transformers checks the type of each
VOCABULARY_SIZE = Kind(
    "a number of tokens from 1 to 10,000,000", lambda value: type(value) is int and 1 <= value <= 10**7
)
# Keys of the original layout and their names in transformers; the first pattern that matches is applied.
RENAMED = (
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.(vision_tower\.)?(vision_model\.)?", "model.vision_tower."),
    (r"^model\.(?=(embed_tokens|layers|norm)\.)", "model.language_model."),
)
TOWER, POSITIONS = "model.vision_tower.", "model.vision_tower.embeddings.position_embedding.weight"
VOCABULARY_WEIGHTS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
SYSTEM = (  # the system prompt of LLaVA's conversation llava_v1, which GeoChat uses, too
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
TEMPLATE = (
    SYSTEM + "{% for message in messages %} {{ message['role'] | upper }}: {% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>\n{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def is_original(raw: Config) -> bool:
    """Whether config.json was written by LLaVA's own code: a language model's config with fields about images."""
    return "mm_vision_tower" in raw and "vision_config" not in raw


def with_geochat_label(raw: Config, family: Family) -> Family:
    """The family, under GeoChat's name if the checkpoint is GeoChat's."""
    return replace(family, label="GeoChat") if raw.get("model_type") == "geochat" else family


def converted_config(raw: Config, name: str) -> LlavaConfig:
    """The config in transformers' terms, with one more token: the placeholder for image features."""
    if raw.get("mm_projector_type") != "mlp2x_gelu":
        raise UserError(
            f"{name} has the projector {raw.get('mm_projector_type')!r} of LLaVA's original layout; only mlp2x_gelu, "
            "of LLaVA-1.5 and GeoChat, is known"
        )
    try:
        check(raw, {"vocab_size": VOCABULARY_SIZE, "mm_vision_tower": FILE}, {"rope_scaling": OBJECT})
        return _converted_config(raw, name)
    except UserError:
        raise
    except Exception as error:  # transformers checks each value, with its own types of error
        raise UserError(
            f"config.json of {name} does not fit LLaVA's original layout ({reason(error)}); fetch it again"
        ) from error


def _converted_config(raw: Config, name: str) -> LlavaConfig:
    """The conversion itself, whose errors `converted_config` explains."""
    known = set(LlamaConfig().to_dict()) - {"architectures", "model_type", "dtype", "transformers_version"}
    vocabulary_size = int(raw["vocab_size"])
    # fields of LLaVA's own code are dropped here and read below
    text = {key: value for key, value in raw.items() if key in known and value is not None} | {
        "vocab_size": vocabulary_size + 1
    }
    # transformers keeps all RoPE settings in one field, the original layout in two
    scaling = raw.get("rope_scaling") or {}
    rope = {"rope_type": scaling.get("type", "default"), "rope_theta": raw.get("rope_theta", 10000.0)}
    text["rope_parameters"] = {**rope, **{key: value for key, value in scaling.items() if key != "type"}}
    tower = dict(_tower(str(raw["mm_vision_tower"]), name))
    tower["image_size"] = IMAGE_SIZES.get(str(raw.get("model_type")), tower["image_size"])
    build: Callable[..., LlavaConfig] = LlavaConfig  # token ids are fields of every config, without a type hint
    return build(
        vision_config=CLIPVisionConfig(**tower),
        text_config=LlamaConfig(**text),
        image_token_index=vocabulary_size,
        image_seq_length=(tower["image_size"] // tower["patch_size"]) ** 2,
        vision_feature_layer=raw.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if raw.get("mm_vision_select_feature") == "cls_patch" else "default",
        tie_word_embeddings=False,
        dtype=raw.get("torch_dtype") or raw.get("dtype"),
        pad_token_id=raw.get("pad_token_id"),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw.get("eos_token_id"),
    )


def _tower(tower: str, name: str) -> Config:
    """The config of a vision tower: a known one, or that of the tower's own folder or hub repository."""
    if tower in TOWERS:
        return TOWERS[tower]
    try:
        config = json_object(model_folder(tower, config_only=True) / "config.json", tower)
        inside = check(config, {}, {"vision_config": OBJECT}).get("vision_config") or config
    except (UserError, InvalidValue) as error:
        why = f"{name} names the vision tower {tower} (mm_vision_tower), whose config.json cannot be read"
        raise UserError(f"{why} ({reason(error)})") from error
    known = CLIPVisionConfig().to_dict()
    return {key: value for key, value in inside.items() if key in known}


def original_weight_files(folder: Path, name: str) -> list[Path]:
    """The weight files: safetensors, or pickles as they are published, which are read without running their code."""
    index, whole = folder / "pytorch_model.bin.index.json", folder / "pytorch_model.bin"
    if any(folder.glob("*.safetensors")):
        return weight_files(folder, name)
    if not_a_file(index) == not_a_file(whole) == MISSING:
        raise UserError(
            f"{name} has no weights here; those in LLaVA's original layout are often pickles, which sensitivity does "
            "not download: type `hf download NAME --local-dir FOLDER` and give the folder"
        )
    return [whole] if not_a_file(index) == MISSING else shards_of(index, name)


Read = Callable[[], Tensor]


def converted(
    raw: Config, config: LlavaConfig, files: Sequence[Path], name: str
) -> dict[str, tuple[torch.dtype, Read]]:
    """All tensors by transformers' names: their dtype, and a function that reads and converts each.

    A tensor without a counterpart keeps its name, and loading reports it.
    """
    tensors = {_renamed(key): one for file in files for key, one in _tensors_of(file, name).items()}
    if not any(key.startswith(TOWER) for key in tensors):  # the tower was frozen in training, and not saved again
        tower = str(raw["mm_vision_tower"])
        for file in weight_files(model_folder(tower), tower):
            theirs = {key: one for key, one in _tensors_of(file, tower).items() if key.startswith("vision_model.")}
            tensors |= {TOWER + key.removeprefix("vision_model."): one for key, one in theirs.items()}
    conversions = {POSITIONS: partial(interpolated, side=isqrt(config.image_seq_length))}
    conversions |= dict.fromkeys(
        VOCABULARY_WEIGHTS, partial(_with_image_token_row, vocabulary_size=config.image_token_index)
    )
    for key, change in conversions.items():
        if key in tensors:
            dtype, read = tensors[key]
            tensors[key] = dtype, partial(_changed, change, read)
    return tensors


def _changed(change: Callable[[Tensor], Tensor], read: Read) -> Tensor:
    """Read a tensor and convert it."""
    return change(read())


def _with_image_token_row(rows: Tensor, vocabulary_size: int | None) -> Tensor:
    """Add a row for the placeholder token: a copy of row 0, the unknown token, which is as unlikely to be generated."""
    return torch.cat([rows, rows[:1]]) if len(rows) == vocabulary_size else rows


def _renamed(key: str) -> str:
    """A tensor's name in transformers."""
    for pattern, new in RENAMED:
        key, count = re.subn(pattern, new, key)
        if count:
            break
    return key


def _tensors_of(file: Path, name: str) -> dict[str, tuple[torch.dtype, Read]]:
    """The dtype of each tensor in a file, and a function that reads it; none is read yet."""
    if file.suffix == ".safetensors":
        return {key: (entry.dtype, partial(_read_tensor, file, key)) for key, entry in header(file).items()}
    try:
        if trouble := not_a_file(file):
            raise InvalidValue(trouble)
        # weights_only runs no code of the pickle; mmap reads a tensor's bytes when they are used
        tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in tensors.items()):
            raise InvalidValue("it holds other things than tensors")
    except Exception as error:  # torch's own, pickle's, zip's
        raise UserError(f"{file.name} of {name} cannot be read as weights alone ({reason(error)})") from error
    return {key: (tensor.dtype, tensor.detach) for key, tensor in tensors.items()}  # memory-mapped


def _read_tensor(file: Path, key: str) -> Tensor:
    """Read one tensor from a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
        return tensor


def interpolated(positions: Tensor, side: int) -> Tensor:
    """Position embeddings for `side` x `side` patches: bicubic, corners aligned; the class token's is kept."""
    stored_side = round((len(positions) - 1) ** 0.5)
    if stored_side == side:
        return positions
    grid = positions[1:].float().T.reshape(1, -1, stored_side, stored_side)
    larger = torch.nn.functional.interpolate(grid, size=side, mode="bicubic", align_corners=True)
    return torch.cat([positions[:1], larger.flatten(2)[0].T.to(positions.dtype)])


def original_processor(folder: Path, name: str, config: LlavaConfig) -> ProcessorMixin | None:
    """LLaVA's processor for the image size of the tower, with the checkpoint's own tokenizer."""
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model")):
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, config=config.text_config, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise UserError(f"the tokenizer of {name} cannot be loaded ({reason(error)})") from error
    # the new token gets the first free id, which must be the image_token_index that the config was given
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    if tokenizer.convert_tokens_to_ids("<image>") != config.image_token_index:
        raise UserError(
            f"the tokenizer of {name} has {len(tokenizer) - 1} tokens and its config.json {config.image_token_index} "
            "(vocab_size); fetch both again"
        )
    vision, build = config.vision_config, cast(Callable[..., ProcessorMixin], LlavaProcessor)
    assert isinstance(vision, CLIPVisionConfig)
    side = vision.image_size
    assert isinstance(side, int)
    return build(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
