"""Safetensors written as a stream: the header is known beforehand, so that no more than one layer is in memory."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from sensitivity.formats.writing import packing
from sensitivity.formats.writing.source import CODES

SHARD = 5_000_000_000  # bytes of tensors in a file
AHEAD = 2  # layers that are made at once: more would only be more memory
SOON = 64_000_000  # bytes after which what was written is on its way to the disk


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


def write(folder: Path, pieces: Iterable[Piece], limit: int = SHARD, ahead: int = 1) -> dict[str, str]:
    """Write all pieces, in one file or several with an index; the sha256 of each file.

    With `ahead`, that many pieces are made at once, each by a thread of its own: for pieces that know nothing of
    each other.
    """
    shards = _split(list(pieces), limit)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    hashes = {name: _file(folder / name, shard, ahead) for name, shard in zip(names, shards, strict=True)}
    packing.ROOMS.clear()
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


def _file(target: Path, pieces: Sequence[Piece], ahead: int) -> str:
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
        for piece, tensors in _made(pieces, ahead):
            for spec, tensor in zip(piece.specs, tensors, strict=True):
                found = (tensor.dtype, tuple(tensor.shape))
                assert found == (spec.dtype, spec.shape), f"{spec.key}: {found} instead of {spec.dtype}, {spec.shape}"
                plain = tensor.detach().contiguous().cpu().reshape(-1)
                if spec.bytes:
                    stream.put(plain.view(torch.uint8).numpy().data)
    return stream.sha256


def _made(pieces: Sequence[Piece], ahead: int) -> Iterator[tuple[Piece, Sequence[Tensor]]]:
    """Pieces and their tensors in order; the threads of torch are shared out among those who make them."""
    own = torch.get_num_threads()
    if (makers := min(ahead, own)) < 2:
        yield from ((piece, piece.make()) for piece in pieces)
        return
    torch.set_num_threads(own // makers)
    made: deque[tuple[Piece, Future[Sequence[Tensor]]]] = deque()
    try:
        with ThreadPoolExecutor(makers) as threads:
            for piece in pieces:
                made.append((piece, threads.submit(piece.make)))
                if len(made) == makers:
                    first, tensors = made.popleft()
                    yield first, tensors.result()
            while made:
                first, tensors = made.popleft()
                yield first, tensors.result()
    finally:
        torch.set_num_threads(own)


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
                behind = 0
                while (content := self.waiting.get()) is not None:
                    for start in range(0, len(content), SOON):
                        some = content[start : start + SOON]
                        file.write(some)
                        digest.update(some)
                        behind += len(some)
                        if behind >= SOON:
                            behind = _begin_to_store(file.fileno())
            self.sha256 = digest.hexdigest()
        except OSError as error:
            self.failure = error
            while self.waiting.get() is not None:  # nobody may wait for a thread that has given up
                pass


def _begin_to_store(file: int) -> int:
    """Have the disk take over what was written, while the next layers are made: without that all waits for the end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # the kernel then writes what it must before it forgets
    return 0
