"""Reads checkpoints in a foreign layout as if they were in transformers' own, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sensitivity.models.original_llava import Read, converted, converted_config, files_of, is_original, processor_for

__all__ = ["Converted", "as_converted", "as_written", "is_original"]


@dataclass(frozen=True)
class Converted:
    """A checkpoint as it would be in transformers' layout."""

    config: Mapping[str, Any]
    processor: Any
    files: list[Path]  # the weight files
    tensors: Mapping[str, tuple[torch.dtype, Read]]  # dtype, and a function that reads and converts the tensor


def as_converted(folder: Path, name: str, raw: Mapping[str, Any]) -> Converted:
    """Describe a checkpoint in transformers' layout; its tensors are read and converted when asked for."""
    config, files = converted_config(raw, name), files_of(folder, name)
    words = as_written(config, "LlavaForConditionalGeneration")
    return Converted(words, processor_for(folder, name, config), files, converted(raw, config, files, name))


def as_written(config: Any, architecture: str) -> dict[str, Any]:
    """A configuration as config.json holds it."""
    return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [architecture]}
