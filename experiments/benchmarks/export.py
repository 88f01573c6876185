"""Time and memory of an export, and of each of its steps, against reading and writing the same bytes.

python -m experiments.benchmarks.export [--layers N] writes reports/export-benchmark.md
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from sensitivity.formats.table import write
from sensitivity.formats.writing import stream as shards
from sensitivity.formats.writing.job import Job, codes_from_weights
from sensitivity.formats.writing.packing import pack, unpack
from sensitivity.formats.writing.source import open_checkpoint
from sensitivity.formats.writing.stream import Piece, Spec
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.files import discard, overwrite
from sensitivity.spec.plan import Plan, Scheme

ROOT = Path(__file__).parents[2]
BLOCK = 2**24


def checkpoint(folder: Path, layers: int) -> None:
    """A LLaVA of the 7B's width with few layers and random weights in fp16, written tensor by tensor."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16, image_size=336
        ),
        text_config=LlamaConfig(num_hidden_layers=layers, vocab_size=32064),
    )
    config.architectures, config.dtype = ["LlavaForConditionalGeneration"], torch.float16
    config.save_pretrained(folder)
    model = load(str(folder), config_only=True).model
    draw = torch.Generator().manual_seed(0)

    def piece(name: str, shape: tuple[int, ...]) -> Piece:
        spec = Spec(name, torch.float16, shape)
        return Piece((spec,), lambda: (torch.empty(shape, dtype=torch.float16).normal_(0, 0.02, generator=draw),))

    shards.write(folder, [piece(name, tuple(p.shape)) for name, p in model.named_parameters()])


class Peak:
    """The most anonymous memory of this process within the block, above what it had before any export.

    The page cache does not count; what the allocator keeps from one export to the next does.
    """

    before = 0

    def __enter__(self) -> Peak:
        Peak.before = Peak.before or self._now()
        self.most = self._now()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.01):
            self.most = max(self.most, self._now())

    def _now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def forget(folder: Path) -> None:
    """Drop the model's files from the page cache, so that they are read from the disk again."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_and_write(folder: Path, size: int, target: Path) -> float:
    """Seconds to read the model's files and to write as many bytes as an export does, with fsync."""
    block = bytearray(os.urandom(BLOCK))
    began = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass
    with target.open("wb", buffering=0) as stream:
        for start in range(0, size, BLOCK):
            stream.write(memoryview(block)[: min(BLOCK, size - start)])
            if start // BLOCK % 4 == 3:  # as an export does: writing out early makes the fsync at the end shorter
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.fsync(stream.fileno())
    discard(target, ours=True)
    return time.perf_counter() - began


def exporting(folder: Path, parts: ComponentMap, scheme: Scheme, space: Path, cached: bool) -> list[str]:
    job = Job(str(folder), parts, Plan.uniform(parts, scheme), dtype=torch.float16)
    total, largest = (f(tensor.bytes for tensor in job.source.tensors) for f in (sum, max))
    if not cached:
        forget(folder)
    with Peak() as peak:
        began, cores = time.perf_counter(), time.process_time()
        done = write(job, space / "out", "compressed-tensors", force=True)
        seconds, cores = time.perf_counter() - began, time.process_time() - cores
    if not cached:
        forget(folder)
    plain = read_and_write(folder, done["written"]["bytes"], space / "plain")
    return [
        str(scheme.bits), str(scheme.group), "memory" if cached else "disk", f"{total / 1e9:.2f}",
        f"{done['written']['bytes'] / 1e9:.2f}", f"{seconds:.1f}", f"{cores:.1f}", f"{plain:.1f}",
        f"{seconds / plain:.1f}", f"{(peak.most - peak.before) / 1e6:.0f}", f"{largest / 1e6:.0f}",
    ]  # fmt: skip


def busy(work: Callable[[], object], times: int = 5) -> float:
    """CPU seconds of this thread, the best of a few runs; waiting and other processes do not count."""
    best = float("inf")
    for _ in range(times):
        began = time.thread_time()
        work()
        best = min(best, time.thread_time() - began)
    return best


def stages(scheme: Scheme, folder: Path) -> list[str]:
    """CPU nanoseconds per weight for each step of exporting a layer that is in memory."""
    weight = torch.empty(4096, 11008, dtype=torch.float16).normal_(0, 0.02)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    codes = codes_from_weights("w", weight, scheme).codes
    words = pack(codes, scheme.bits).numpy().data
    target = folder / "plain"
    tensors = [t for t in open_checkpoint(str(folder / "model")).tensors if t.bytes == 2 * weight.numel()]

    def read() -> None:
        torch.aminmax(tensors[0].read())

    def store() -> None:
        with target.open("wb") as stream:
            stream.write(words)

    found = [
        busy(read),
        busy(lambda: codes_from_weights("w", weight, scheme)),
        busy(lambda: pack(codes, scheme.bits)),
        busy(lambda: hashlib.sha256(words).digest()),
        busy(store),
    ]
    torch.set_num_threads(threads)
    each = [seconds / weight.numel() * 1e9 for seconds in found]
    return [str(scheme.bits), str(scheme.group), *(f"{ns:.2f}" for ns in each), f"{sum(each):.2f}"]


def packing(bits: int) -> list[str]:
    codes = torch.randint(2**bits, (8192, 8192), dtype=torch.uint8)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        words = pack(codes, bits)
        best = min(best, time.perf_counter() - began)
    assert torch.equal(unpack(words[:16], bits, 8192), codes[:16])
    as_they_are = words.data_ptr() == codes.data_ptr()
    return [str(bits), "packed as they are" if as_they_are else f"{codes.numel() / best / 1e9:.2f}"]


def rows(head: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def alone(exports: list[list[str]]) -> str:
    seconds = [float(row[6]) / (os.cpu_count() or 1) for row in exports]
    return f"{min(seconds):.1f} to {max(seconds):.1f} s"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--layers", type=int, default=2, help="of the language model; the 7B has 32")
    p.add_argument("--out", type=Path, default=ROOT / "reports" / "export-benchmark.md")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as name:
        space = Path(name)
        (space / "model").mkdir()
        checkpoint(space / "model", args.layers)
        parts = inspect(str(space / "model"), by="part")
        schemes = [Scheme("rtn", bits, group) for bits, group in ((4, "row"), (4, 128), (3, 128), (8, "row"))]
        exports = [
            exporting(space / "model", parts, scheme, space, cached) for cached in (False, True) for scheme in schemes
        ]
        costs = [stages(scheme, space) for scheme in schemes]
    head = ["bits", "group", "read from", "GB read", "GB written", "export, s", "of it busy, s", "read + write, s"]
    head += ["ratio", "peak memory, MB", "largest tensor, MB"]
    kinds = ["bits", "group", "read, finite?", "round", "pack", "hash", "write", "sum"]
    threads = torch.get_num_threads()
    lines = [
        "# Streaming and packing",
        "",
        f"`python -m experiments.benchmarks.export --layers {args.layers}` on {os.cpu_count()} cores, torch "
        f"{torch.__version__} with {threads} threads; load average at the end {os.getloadavg()[0]:.1f}.",
        "",
        f"A LLaVA of the 7B's width with {args.layers} language layers and random weights, exported to "
        "compressed-tensors. An export includes rounding to nearest, hashing and fsync; two layers are "
        "computed at a time while a third is written. `of it busy` is CPU seconds over all cores. Peak memory "
        "is what the export added. Other work on the machine slows the export down but hardly reading and "
        "writing: see the load average.",
        "",
        *rows(head, exports),
        "",
        f"On {os.cpu_count()} idle cores the CPU seconds alone would take {alone(exports)}.",
        "",
        "The limit: CPU nanoseconds per weight of a 4096 x 11008 layer, the best of five runs. The sum divided by the "
        "number of cores is the shortest possible time of an export, if the disk is not slower.",
        "",
        *rows(kinds, costs),
        "",
        "Packing codes that are in memory (8192 x 8192), the best of five:",
        "",
        *rows(["bits", "GB of codes a second"], [packing(bits) for bits in (2, 3, 4, 5, 6, 8)]),
        "",
    ]
    overwrite(args.out, "\n".join(lines))
    print(json.dumps({"wrote": args.out.name}))


if __name__ == "__main__":
    main()
