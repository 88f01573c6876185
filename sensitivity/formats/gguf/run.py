"""Opens a GGUF export in llama.cpp, after checking that every tensor is as it was written, to evaluate tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sensitivity.formats.gguf.clip_in_torch import GGUFModelWithCLIP
from sensitivity.formats.gguf.exporter import STORED, check, is_clip
from sensitivity.formats.gguf.library import check_installed
from sensitivity.formats.gguf.model import GGUFModel
from sensitivity.formats.halved.model import Running, unlike
from sensitivity.models.loading import load
from sensitivity.spec.errors import UserError


def running(folder: Path, threads: int) -> Running:
    """An export opened in llama.cpp, which evaluates tasks."""
    check(str(folder))
    check_installed()
    check_arrived(folder)
    return Running.of(folder, opened(folder, threads), "llama.cpp")


def opened(folder: Path | str, threads: int = 0) -> GGUFModel:
    """An export opened in llama.cpp; its image half runs in transformers if llama.cpp computes that wrongly."""
    clip = is_clip(load(str(folder), config_only=True).model.config)
    return (GGUFModelWithCLIP if clip else GGUFModel)(folder, threads)


def check_arrived(folder: Path) -> None:
    """Raise an error unless the package gguf reads the tensors that were written, by name and byte, and no others."""
    from gguf import GGUFReader

    stored: Mapping[str, Mapping[str, str]] = json.loads((folder / STORED).read_bytes())
    for file, expected in stored.items():
        found = {one.name: one.data for one in GGUFReader(folder / file).tensors}
        if wrong := [*unlike(found, expected), *(name for name in found if name not in expected)]:
            raise UserError(f"{folder / file} does not hold {', '.join(wrong[:4])} as written; export again")
