"""How fast an export streams, how much memory it takes, and how fast codes are packed, against reading and writing.

python experiments/benchmarks/export.py [--layers N] writes reports/export-benchmark.md
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from sensitivity.components import ComponentMap
from sensitivity.export import Job, shards, write
from sensitivity.export.packing import pack, unpack
from sensitivity.export.shards import Piece, Spec
from sensitivity.models import inspect, load
from sensitivity.plan import Plan, Scheme

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


def read_and_write(folder: Path, size: int, target: Path) -> float:
    """Seconds to read the model's files and to write as many bytes as an export, and put them on disk."""
    began = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(BLOCK):
                pass
    block = os.urandom(BLOCK)
    with target.open("wb", buffering=0) as stream:
        for start in range(0, size, BLOCK):
            stream.write(block[: min(BLOCK, size - start)])
        os.fsync(stream.fileno())
    target.unlink()
    return time.perf_counter() - began


def exporting(folder: Path, parts: ComponentMap, scheme: Scheme, space: Path) -> list[str]:
    job = Job(str(folder), parts, Plan.uniform(parts, scheme), dtype=torch.float16)
    largest = max(tensor.bytes for tensor in job.source.tensors)
    with Peak() as peak:
        began = time.perf_counter()
        done = write(job, space / "out", "compressed-tensors", force=True)
        seconds = time.perf_counter() - began
    plain = read_and_write(folder, done["written"]["bytes"], space / "plain")
    total = sum(tensor.bytes for tensor in job.source.tensors)
    return [
        str(scheme.bits), str(scheme.group), f"{total / 1e9:.2f}", f"{done['written']['bytes'] / 1e9:.2f}",
        f"{seconds:.1f}", f"{plain:.1f}", f"{seconds / plain:.1f}", f"{(peak.most - peak.before) / 1e6:.0f}",
        f"{largest / 1e6:.0f}",
    ]  # fmt: skip


def packing(bits: int) -> list[str]:
    codes = torch.randint(2**bits, (8192, 8192), dtype=torch.uint8)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        words = pack(codes, bits)
        best = min(best, time.perf_counter() - began)
    assert torch.equal(unpack(words[:16], bits, 8192), codes[:16])
    return [str(bits), f"{codes.numel() / best / 1e9:.2f}"]


def rows(head: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


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
        exports = [exporting(space / "model", parts, scheme, space) for scheme in schemes]
    head = ["bits", "group", "GB read", "GB written", "export, s", "read + write, s", "ratio"]
    head += ["peak memory, MB", "largest tensor, MB"]
    threads = torch.get_num_threads()
    lines = [
        "# Streaming and packing",
        "",
        f"`python experiments/benchmarks/export.py --layers {args.layers}` on {os.cpu_count()} cores, torch "
        f"{torch.__version__} with {threads} threads; load average at the end {os.getloadavg()[0]:.1f}.",
        "",
        f"A LLaVA of the 7B's width with {args.layers} language layers and random weights to compressed-tensors. "
        "Rounding to nearest, hashing and putting the files on disk are part of the export. Memory is what was "
        "added at the peak. Other work on the machine slows all of it: see the load average.",
        "",
        *rows(head, exports),
        "",
        "Packing codes that are in memory (8192 x 8192), the best of five:",
        "",
        *rows(["bits", "GB of codes a second"], [packing(bits) for bits in (2, 3, 4, 5, 6, 8)]),
        "",
    ]
    args.out.write_text("\n".join(lines), encoding="utf-8")
    print(json.dumps({"wrote": args.out.name}))


if __name__ == "__main__":
    main()
