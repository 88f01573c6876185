"""Reads checkpoints in a foreign layout as if they were in transformers' own, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, ProcessorMixin

from sensitivity.models.original_llava import (
    Read,
    converted,
    converted_config,
    is_original,
    original_processor,
    original_weight_files,
)

__all__ = ["Converted", "as_converted", "config_json", "is_original"]


@dataclass(frozen=True)
class Converted:
    """A checkpoint as it would be in transformers' layout."""

    config: Mapping[str, object]
    processor: ProcessorMixin | None
    files: list[Path]  # the weight files
    tensors: Mapping[str, tuple[torch.dtype, Read]]  # dtype, and a function that reads and converts the tensor


def as_converted(folder: Path, name: str, raw: Mapping[str, object]) -> Converted:
    """Describe a checkpoint in transformers' layout; each tensor is read and converted when its function is called."""
    config, files = converted_config(raw, name), original_weight_files(folder, name)
    written = config_json(config, "LlavaForConditionalGeneration")
    return Converted(written, original_processor(folder, name, config), files, converted(raw, config, files, name))


def config_json(config: PreTrainedConfig, architecture: str) -> dict[str, object]:
    """The content of config.json for a configuration and the class of its model."""
    return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [architecture]}
