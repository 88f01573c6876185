"""A model of true shape from sweep to verified export, each command in a process of its own: seconds and memory.

python -m experiments.true_shapes qwen2-vl-2b /tmp/2b
python -m experiments.benchmarks.whole_way /tmp/2b [--bits 4] [--calibration 16] >> reports/true-shapes.md

Calibration, quantization and evaluation are the sweep's: one plan, with full precision beside it. A command that takes
more memory than allowed fails by the limit of its address space, so that the figure is not a matter of luck.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from experiments.benchmarks.true_shapes import pictures
from sensitivity.spec.plan_file import write_file
from sensitivity.study.study import Study

COLUMNS = "| command | s | CPU s | most memory, GB |"


def command(*words: str) -> tuple[float, float, float]:
    """Run one command: wall seconds, CPU seconds, and the most memory that its largest process had, in GB."""
    print("sensitivity", *words, file=sys.stderr, flush=True)
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "sensitivity", *words], stdout=sys.stderr)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"sensitivity {words[0]} ended with {process.returncode}")
    return time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9


def plan_file(folder: Path) -> Path:
    """The quantized plan of a study with one, as a file in the study."""
    study = Study(folder)
    (plan,) = (trial.plan for trial in study.trials() if not trial.plan.is_native)
    return write_file(study.parts, plan, {}, folder / "plan.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that experiments.true_shapes made")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--group", default="128", help="a divisor of all rows, so that the format holds every layer")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--most-gb", type=float, default=24, help="what a command may take (default: 24)")
    args = parser.parse_args()
    found: dict[str, tuple[float, float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        study, out = work / "study", work / "export"
        data = str(pictures(work, args.images, args.calibration))
        sweep = ["sweep", args.model, "--task", data, "--bits", args.bits, "--by", "part", "--method", "gptq"]
        more = ["--group", args.group, "--calibration-n", str(args.calibration)]
        found["sweep"] = command(*sweep, *more, "--workers", "1", "--out", str(study))
        # by a file: weights are random, no answer is right, and so nothing can be recommended for a budget
        file = str(plan_file(study))
        found["export"] = command("export", file, "--format", "compressed-tensors", "--out", str(out))
        found["verify"] = command("verify", str(out))
    most = max(memory for *_, memory in found.values())
    print(f"## {Path(args.model).name}, the whole way\n")
    print("    python -m experiments.benchmarks.whole_way", *sys.argv[1:])
    print(f"\ntorch {torch.__version__}, {os.cpu_count()} cores.\n\n{COLUMNS}")
    print("|---|---|---|---|")
    for name, (wall, cpu, memory) in found.items():
        print(f"| {name} | {wall:.0f} | {cpu:.0f} | {memory:.1f} |")
    print(f"\n{most:.1f} GB at most, of the {args.most_gb:g} GB that are allowed.")
    if most > args.most_gb:
        sys.exit("more memory than allowed")


if __name__ == "__main__":
    main()
