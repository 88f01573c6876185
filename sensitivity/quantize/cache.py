"""A folder of tensors by what they depend on: shared by processes, bounded, and safe to delete at any time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sensitivity.files import whole

VERSION = 1  # raised when the meaning of an entry changes


def home() -> Path:
    """SENSITIVITY_CACHE, or where this system keeps caches."""
    if chosen := os.environ.get("SENSITIVITY_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sensitivity"


@dataclass(frozen=True)
class Cache:
    """Entries are files named after the hash of a description; the least recently used go first."""

    folder: Path
    limit_gb: float = 8.0

    def fetch(
        self, about: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]], device: torch.device
    ) -> dict[str, Tensor]:
        """The tensors described, from the folder or made now; on another machine or another torch they are others."""
        here = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(device), "v": VERSION}
        text = json.dumps({**about, **here}, sort_keys=True)
        file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
        with suppress(OSError, SafetensorError):  # not there, being deleted, or not whole: made again
            found = load_file(file, device=str(device))
            os.utime(file)
            return found
        made = {name: tensor.contiguous() for name, tensor in make().items()}
        size = sum(tensor.numel() * tensor.element_size() for tensor in made.values())
        if size <= self.limit_gb * 1e9:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            with whole(file) as unfinished:
                save_file(made, unfinished, metadata={"about": text})
        return made

    def _make_room(self, size: int) -> None:
        """Delete the oldest entries until the new one fits; other processes may be doing the same."""
        entries = []
        for file in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):
                entries.append((file.stat().st_mtime_ns, file.stat().st_size, file))
        total = size + sum(entry[1] for entry in entries)
        for _, bytes_, file in sorted(entries, key=lambda entry: entry[0]):
            if total <= self.limit_gb * 1e9:
                break
            file.unlink(missing_ok=True)
            total -= bytes_
