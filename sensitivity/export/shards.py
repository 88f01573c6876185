"""Safetensors written as a stream: the header is known beforehand, so that no more than one layer is in memory."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from sensitivity.export.source import CODES

SHARD = 5_000_000_000  # bytes of tensors in a file


@dataclass(frozen=True)
class Spec:
    """A tensor that is going to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together, when their turn has come, in the order of their specs."""

    specs: tuple[Spec, ...]
    make: Callable[[], Sequence[Tensor]]

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.specs)


def write(folder: Path, pieces: Iterable[Piece], limit: int = SHARD) -> dict[str, str]:
    """Write all pieces, in one file or several with an index; the sha256 of each file."""
    shards = _split(list(pieces), limit)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    hashes = {name: _file(folder / name, shard) for name, shard in zip(names, shards, strict=True)}
    if len(shards) > 1:
        where = {spec.key: name for name, shard in zip(names, shards, strict=True) for p in shard for spec in p.specs}
        total = sum(piece.bytes for shard in shards for piece in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return hashes


def _split(pieces: list[Piece], limit: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    room = limit
    for piece in pieces:
        if shards[-1] and piece.bytes > room:
            shards.append([])
            room = limit
        shards[-1].append(piece)
        room -= piece.bytes
    return shards


def _file(target: Path, pieces: Sequence[Piece]) -> str:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in (spec for piece in pieces for spec in piece.specs):
        header[spec.key] = {
            "dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, offset + spec.bytes],
        }  # fmt: skip
        offset += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants its data aligned
    with _Stream(target) as stream:
        stream.put(memoryview(len(text).to_bytes(8, "little") + text))
        for piece in pieces:
            for spec, tensor in zip(piece.specs, piece.make(), strict=True):
                found = (tensor.dtype, tuple(tensor.shape))
                assert found == (spec.dtype, spec.shape), f"{spec.key}: {found} instead of {spec.dtype}, {spec.shape}"
                plain = tensor.detach().contiguous().cpu().reshape(-1)
                if spec.bytes:
                    stream.put(plain.view(torch.uint8).numpy().data)
    return stream.sha256


class _Stream:
    """A file that is written and hashed by another thread, at most one tensor behind."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.waiting: queue.Queue[memoryview | None] = queue.Queue(maxsize=1)
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.sha256 = ""

    def __enter__(self) -> _Stream:
        self.thread.start()
        return self

    def put(self, content: memoryview) -> None:
        if self.failure is None:
            self.waiting.put(content)

    def __exit__(self, *error: object) -> None:
        self.waiting.put(None)
        self.thread.join()
        if self.failure is not None and error[0] is None:
            raise self.failure

    def _run(self) -> None:
        digest = hashlib.sha256()
        try:
            with self.target.open("wb") as file:
                while (content := self.waiting.get()) is not None:
                    file.write(content)
                    digest.update(content)
            self.sha256 = digest.hexdigest()
        except OSError as error:
            self.failure = error
            while self.waiting.get() is not None:  # nobody may wait for a thread that has given up
                pass
