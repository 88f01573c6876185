"""Whether an export streams: the most memory it takes beside the largest layer, for a model that memory could not hold.

python -m experiments.benchmarks.streamed_exports [--shape llava-1.5-7b] [--formats openvino,onnx,gguf] [--depth 1.0]

Each format has a process of its own, which writes the model with all components at 4 bits, symmetric, in groups of 32.
The model has random weights, which change neither memory nor time. Memory is what the process and those that it starts
hold for themselves, sampled a hundred times a second; pages of files, which the system takes back at will, do not
count. `before` is what it holds with its libraries imported and the model inspected. One thread; CPU seconds are those
of all these processes, and seconds depend on what else runs. Writes reports/streamed-exports.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from experiments.benchmarks.export import Peak
from experiments.true_shapes import SHAPES, save
from sensitivity.formats.table import write
from sensitivity.formats.writing.job import Job
from sensitivity.models.discovery import inspect
from sensitivity.spec.files import overwrite
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import GB

REPORT = Path(__file__).parents[2] / "reports" / "streamed-exports.md"
FORMATS = ("openvino", "onnx", "gguf", "compressed-tensors")
SCHEME = Scheme("rtn", 4, 32, True)
COLUMNS = ("format", "model, GB", "written, GB", "largest weight, GB", "before, GB", "most, GB", "s", "CPU s")


class MostMemory(Peak):
    """The most memory that this process and those that it starts hold for themselves within the block, in bytes."""

    def _now(self) -> int:
        own = psutil.Process()
        total = 0
        for one in (own, *own.children(recursive=True)):
            try:
                memory = one.memory_info()
            except psutil.NoSuchProcess:
                continue
            total += memory.rss - memory.shared
        return total


def cpu_seconds() -> float:
    """The CPU seconds of this process, and of those that it started and that have ended."""
    return sum(os.times()[:4])


def export(format: str, model: str, out: Path) -> dict[str, object]:
    """Write one export, and return a row of the table."""
    torch.set_num_threads(1)
    parts = inspect(model, by="group.kind")
    job = Job(model, parts, Plan.uniform(parts, SCHEME), {"model": model}, dtype=torch.bfloat16)
    sizes = [tensor.bytes for tensor in job.source.tensors]
    with MostMemory() as memory:
        began, cores = time.perf_counter(), cpu_seconds()
        write(job, out, format)
        seconds, cores = time.perf_counter() - began, cpu_seconds() - cores
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    in_gb = [f"{size / GB:.2f}" for size in (sum(sizes), written, max(sizes), memory.before, memory.most)]
    return dict(zip(COLUMNS, [format, *in_gb, f"{seconds:.0f}", f"{cores:.0f}"], strict=True))


def in_process(format: str, model: Path, space: Path) -> list[str]:
    """A row of the table from a process of its own; a format that refuses the model says so."""
    command = [sys.executable, "-m", __spec__.name, "--one", format, str(model), str(space / format)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [format, *[""] * (len(COLUMNS) - 2), done.stderr.strip().splitlines()[-1]]
    row = json.loads(done.stdout.splitlines()[-1])
    return [str(row[name]) for name in COLUMNS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llava-1.5-7b")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--depth", type=float, default=1.0, help="the share of the model's blocks")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        format, model, out = args.one
        print(json.dumps(export(format, model, Path(out))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = save(args.shape, Path(folder) / "model", args.depth)
        for format in args.formats.split(","):
            with tempfile.TemporaryDirectory() as space:  # so that the disk holds one export at a time
                rows.append(f"| {' | '.join(in_process(format, model, Path(space)))} |")
            print(rows[-1], flush=True)
    overwrite(REPORT, page(args.shape, args.depth, rows))


def page(shape: str, depth: float, rows: Sequence[str]) -> str:
    title, command, *about = (__doc__ or "").split("\n\n")
    shorter = "" if depth == 1 else f" --depth {depth:g}"
    about[-1] = about[-1].rstrip()
    lines = [f"# {title.rstrip('.')}", f"    {command.partition(' [')[0]} --shape {shape}{shorter}", *about]
    head = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
    return "\n\n".join([*lines, "\n".join([head, *rows])]).rstrip() + "\n"


if __name__ == "__main__":
    main()
