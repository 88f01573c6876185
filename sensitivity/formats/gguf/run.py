"""Opens a GGUF export in llama.cpp, once every tensor is found as it was written, and evaluates tasks on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from sensitivity.formats.gguf.clip_in_torch import GGUFModelWithCLIP
from sensitivity.formats.gguf.export import STORED, check, is_clip
from sensitivity.formats.gguf.library import check_installed
from sensitivity.formats.gguf.model import GGUFModel
from sensitivity.formats.halved.model import Running
from sensitivity.models.config_only import without_weights
from sensitivity.spec.errors import UserError


def running(folder: Path, threads: int) -> Running:
    """An export in llama.cpp, which evaluates tasks."""
    check(str(folder))
    check_installed()
    check_arrived(folder)
    return Running.of(folder, opened(folder, threads), "llama.cpp")


def opened(folder: Path | str, threads: int = 0) -> GGUFModel:
    """An export in llama.cpp; the image half in transformers, where llama.cpp computes that wrongly."""
    clip = is_clip(without_weights(str(folder)).model.config)
    return (GGUFModelWithCLIP if clip else GGUFModel)(folder, threads)


def check_arrived(folder: Path) -> None:
    """Raise an error unless the package gguf reads every tensor, under its own name, with its bytes."""
    from gguf import GGUFReader

    stored: Mapping[str, Mapping[str, str]] = json.loads((folder / STORED).read_bytes())
    for file, expected in stored.items():
        found = {one.name: one.data for one in GGUFReader(folder / file).tensors}
        wrong = [
            name
            for name, digest in expected.items()
            if name not in found or hashlib.sha256(found[name].tobytes()).hexdigest() != digest
        ]
        if wrong or len(found) != len(expected):
            named = ", ".join(wrong[:4]) or "all tensors"
            raise UserError(f"{folder / file} does not hold {named} as written; export again")
