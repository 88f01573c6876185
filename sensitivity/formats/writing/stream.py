"""Writes safetensors and GGUF files as a stream: the header needs only shapes, so memory never holds all tensors."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from sensitivity.formats.writing import packing
from sensitivity.formats.writing.source import DTYPE_NAMES
from sensitivity.spec.stage import each

MAX_SHARD = 5_000_000_000  # bytes of tensors in one file
AT_ONCE = 2  # weights that are quantized at once: more would cost memory and save no time
WRITEBACK = 64_000_000  # bytes between two requests to write to the disk


@dataclass(frozen=True)
class Spec:
    """The key, dtype and shape of a tensor that will be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The bytes that the tensor will take."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """Tensors that are computed together when they are needed, in the order of their specs."""

    specs: tuple[Spec, ...]
    make: Callable[[], Sequence[Tensor]]

    @property
    def bytes(self) -> int:
        """The bytes of all its tensors."""
        return sum(spec.bytes for spec in self.specs)


def write(folder: Path, pieces: Iterable[Piece], limit: int = MAX_SHARD, ahead: int = 1) -> dict[str, str]:
    """Write all pieces into one file, or into several with an index; returns the SHA-256 of each file.

    With `ahead` above 1, that many pieces are computed at once, each in its own thread; they must not depend on each
    other or on their order.
    """
    shards = _split(list(pieces), limit)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    hashes = {name: _file(folder / name, shard, ahead) for name, shard in zip(names, shards, strict=True)}
    packing.FREE_BUFFERS.clear()  # the export is complete, so its buffers are no longer needed
    if len(shards) > 1:
        where = {spec.key: name for name, shard in zip(names, shards, strict=True) for p in shard for spec in p.specs}
        total = sum(piece.bytes for shard in shards for piece in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return hashes


def write_at(
    target: Path, begin: bytes, pieces: Sequence[Piece], offsets: Mapping[str, int], ahead: int = 1
) -> tuple[str, dict[str, str]]:
    """Write the first bytes of a file, and then each tensor at its offset; offsets must rise.

    Returns the SHA-256 of the file, and of each tensor's bytes.
    """
    hashes: dict[str, str] = {}
    with _Stream(target) as stream:
        stream.put(memoryview(begin))
        place = len(begin)
        for piece, tensors in _computed(pieces, ahead):
            for spec, tensor in zip(piece.specs, tensors, strict=True):
                content = _content(spec, tensor)
                assert place <= offsets[spec.key], f"{spec.key} is asked for at {offsets[spec.key]}, before {place}"
                stream.put(memoryview(bytes(offsets[spec.key] - place)))
                stream.put(content)
                hashes[spec.key] = hashlib.sha256(content).hexdigest()
                place = offsets[spec.key] + spec.bytes
    packing.FREE_BUFFERS.clear()
    return stream.sha256, hashes


def _split(pieces: list[Piece], limit: int) -> list[list[Piece]]:
    """Pieces in shards of at most `limit` bytes; a larger piece gets a shard of its own."""
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
    """Write one safetensors file; returns its SHA-256."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in (spec for piece in pieces for spec in piece.specs):
        header[spec.key] = {
            "dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, offset + spec.bytes],
        }  # fmt: skip
        # offsets follow from the specs alone, so the header is complete before any tensor is computed
        offset += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns its data to 8 bytes
    with _Stream(target) as stream:
        stream.put(memoryview(len(text).to_bytes(8, "little") + text))
        for piece, tensors in _computed(pieces, ahead):
            for spec, tensor in zip(piece.specs, tensors, strict=True):
                if spec.bytes:
                    stream.put(_content(spec, tensor))
    return stream.sha256


def _content(spec: Spec, tensor: Tensor) -> memoryview:
    """The bytes of a tensor; offsets are fixed, so a tensor that differs from its spec would corrupt the file."""
    made = (tensor.dtype, tuple(tensor.shape))
    assert made == (spec.dtype, spec.shape), f"{spec.key}: {made} instead of {spec.dtype}, {spec.shape}"
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def _computed(pieces: Sequence[Piece], ahead: int) -> Iterator[tuple[Piece, Sequence[Tensor]]]:
    """Each piece with its tensors, in order, counted for progress lines."""
    return each(_made(pieces, ahead), "writing", "weights", len(pieces))


def _made(pieces: Sequence[Piece], ahead: int) -> Iterator[tuple[Piece, Sequence[Tensor]]]:
    """Each piece with its tensors; torch's threads are divided among the pieces that are computed at once."""
    available = torch.get_num_threads()
    if (makers := min(ahead, available)) < 2:
        yield from ((piece, piece.make()) for piece in pieces)
        return
    torch.set_num_threads(available // makers)
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
        torch.set_num_threads(available)


class _Stream:
    """A file that another thread writes and hashes, at most two tensors behind: it writes one while the next waits.

    Writing and hashing then overlap with computing the next tensor, and memory stays bounded.
    """

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
        """Write and hash what arrives, until None arrives; closing the stream raises an error of this thread."""
        digest = hashlib.sha256()
        try:
            with self.target.open("wb") as file:
                unwritten = 0
                while (content := self.waiting.get()) is not None:
                    for start in range(0, len(content), WRITEBACK):
                        some = content[start : start + WRITEBACK]
                        file.write(some)
                        digest.update(some)
                        unwritten += len(some)
                        if unwritten >= WRITEBACK:
                            unwritten = _start_writeback(file.fileno())
            self.sha256 = digest.hexdigest()
        except OSError as error:
            self.failure = error
            while self.waiting.get() is not None:  # drain the queue, or `put` would block forever
                pass


def _start_writeback(file: int) -> int:
    """Ask the kernel to write the file to the disk now, while the next weights are quantized.

    Otherwise all of it would be written at the end, by fsync. Returns 0, the new count of bytes to write.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # the kernel must write pages back before it drops them
    return 0
