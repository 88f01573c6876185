"""A folder of tensors, keyed by what they depend on: shared by processes, bounded, and safe to delete."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.files import discard, replacing
from sensitivity.spec.sizes import GB

UNSEEN = 0.01  # share of the limit that is written before a cache looks again at what its folder holds
GONE = "No such file"  # in the message of the system where a folder was deleted meanwhile
VERSION = 8  # raised when the meaning of an entry changes


def cache_folder() -> Path:
    """The cache folder: SENSITIVITY_CACHE, or where this system keeps caches."""
    if folder := os.environ.get("SENSITIVITY_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sensitivity"


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A hash of the dtypes, shapes and every bit of some tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Cache:
    """Tensors in files named after the hash of a description; the least recently used files are deleted first.

    The folder is looked through only now and then, since that takes as long as it has files. So each further process
    that writes to it may exceed the limit by the share UNSEEN.
    """

    folder: Path
    limit_gb: float = 8.0
    _room: float = field(default=0.0, init=False, repr=False)  # bytes that may be written before the next look

    def fetch(
        self, description: Mapping[str, object], make: Callable[[], Mapping[str, Tensor]], device: torch.device
    ) -> dict[str, Tensor]:
        """The described tensors, read from the folder or computed now and stored."""
        if (cached := self.load(description, device)) is not None:
            return cached
        tensors = {name: tensor.contiguous() for name, tensor in make().items()}
        self.store(description, tensors, device)
        return tensors

    def load(self, description: Mapping[str, object], device: torch.device) -> dict[str, Tensor] | None:
        """The described tensors, or None if no complete file holds them."""
        file, _ = self._entry(description, device)
        tensors: dict[str, Tensor] | None = None
        with suppress(OSError, SafetensorError, RuntimeError):  # missing, deleted just now, or cut short
            tensors = load_file(file)
            os.utime(file)  # marks the entry as recently used
        return None if tensors is None else {name: tensor.to(device) for name, tensor in tensors.items()}

    def store(self, description: Mapping[str, object], tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Write tensors under their description, unless they exceed the limit or the folder cannot be written."""
        file, text = self._entry(description, device)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size <= self.limit_gb * GB:
            # safetensors refuses tensors that share memory
            unshared = {name: t.contiguous().clone() for name, t in tensors.items()}
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._make_room(size)
                with replacing(file) as unfinished:
                    save_file(unshared, unfinished, metadata={"about": text})
            except (OSError, SafetensorError, UserError) as error:
                # that the folder was deleted meanwhile, or between two looks of mkdir, is no reason to warn
                made_anew = isinstance(error, FileExistsError) and not self.folder.is_file()
                if GONE not in f"{error} {error.__cause__}" and not made_anew:
                    kept = f"nothing can be kept in {self.folder}: calibration is done again by the next run ({error})"
                    warnings.warn(kept, Notice, stacklevel=2)

    def _entry(self, description: Mapping[str, object], device: torch.device) -> tuple[Path, str]:
        """An entry's file and description, which includes torch's version and threads: they change how sums round."""
        environment = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": str(device),
            "v": VERSION,
        }
        text = json.dumps({**description, **environment}, sort_keys=True)
        return self.folder / f"{_name(text)}.safetensors", text

    def _make_room(self, size: int) -> None:
        """Delete the least recently used entries until the new one fits; other processes may do the same."""
        if size <= self._room:
            self._room -= size
            return
        limit, entries = self.limit_gb * GB, []
        with os.scandir(self.folder) as files:
            for file in files:
                if file.name.endswith(".safetensors"):
                    with suppress(FileNotFoundError):
                        entries.append((file.stat().st_mtime_ns, file.stat().st_size, Path(file.path)))
        total = size + sum(entry[1] for entry in entries)
        # a full folder is emptied a bit further, or the next entry would have to look through it again
        goal = limit if total <= limit else max((1 - UNSEEN) * limit, size)
        for _, bytes_, path in sorted(entries, key=lambda entry: entry[0]):
            if total <= goal:
                break
            if discard(path, _is_entry(path)):  # the folder may also hold foreign files, which stay
                total -= bytes_
        self._room = max(0.0, min(limit - total, UNSEEN * limit))


def _is_entry(file: Path) -> bool:
    """Whether a file is a cache entry: named after the hash of the description in its metadata."""
    try:
        with safe_open(file, framework="pt") as opened:
            description = (opened.metadata() or {}).get("about", "")
    except (OSError, SafetensorError, RuntimeError):  # another process may be deleting it
        return False
    return file.stem == _name(description)


def _name(text: str) -> str:
    """The file name of an entry with this description."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
