"""Checkpoints in a layout that is not transformers' own, as if they were in it: each tensor when it is asked for."""

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
    """What such a checkpoint would be in transformers' layout."""

    config: Mapping[str, Any]
    processor: Any
    files: list[Path]  # that hold the tensors
    tensors: Mapping[str, tuple[torch.dtype, Read]]  # type, and how one is read and converted


def as_converted(folder: Path, name: str, raw: Mapping[str, Any]) -> Converted:
    config, files = converted_config(raw, name), files_of(folder, name)
    words = as_written(config, "LlavaForConditionalGeneration")
    return Converted(words, processor_for(folder, name, config), files, converted(raw, config, files, name))


def as_written(config: Any, architecture: str) -> dict[str, Any]:
    """A configuration as a file has it."""
    return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [architecture]}
