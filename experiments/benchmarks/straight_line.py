"""Time and memory of the basic commands: import, --help, one plan, the demo, and the demo again.

python -m experiments.benchmarks.straight_line    # writes reports/straight_line.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sensitivity.spec.files import overwrite

ROOT = Path(__file__).parent.parent.parent
CONFIGURATION = """
import json, resource, statistics, sys, time
from sensitivity import inspect, load, scheme, task
from sensitivity.spec.plan import Plan
from sensitivity.measure.loop import _SharedWork
vlm = load("embedded:scenes-llava")
parts = inspect(vlm, by="part")
trial = _SharedWork(vlm, parts, [task("vqa", n=1000)])
wall, cpu = [], []
for bits in (8, 7, 6, 5, 4, 3, 2):  # every part changes with every plan, so nothing is shared with the plan before
    began, spent = time.perf_counter(), time.process_time()
    trial.run(Plan.uniform(parts, scheme("uniform", bits)), 0, trial.ends[-1])
    wall.append(time.perf_counter() - began)
    cpu.append(time.process_time() - spent)
print(json.dumps({"wall": wall, "cpu": cpu}))
"""


def timed(command: list[str]) -> tuple[float, float, float, str]:
    """Wall seconds, CPU seconds and peak megabytes of a command with its children, and what it printed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, printed
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu or usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "straight_line.md")
    args = parser.parse_args()
    me = [sys.executable]
    rows: list[tuple[str, str, float, float, float]] = []
    for name, words in (
        ("import sensitivity", ["-c", "import sensitivity"]),
        ("--help", ["-m", "sensitivity", "--help"]),
    ):
        runs = [timed([*me, *words])[:3] for _ in range(5)]
        rows.append((f"`{name}`, median of 5", "0.5 s", *(statistics.median(run[i] for run in runs) for i in range(3))))
    wall, cpu, memory, printed = timed([*me, "-c", CONFIGURATION])
    each = json.loads(printed)
    label = "one configuration, 1,000 questions, nothing shared; median of 7"
    rows.append((label, "1.5 s", statistics.median(each["wall"]), statistics.median(each["cpu"]), memory))
    with tempfile.TemporaryDirectory() as folder:
        for name, aim in (("`sensitivity demo`", "180 s"), ("`sensitivity demo` again", "-")):
            wall, cpu, memory, _ = timed([*me, "-m", "sensitivity", "demo", "--out", f"{folder}/demo"])
            rows.append((name, aim, wall, cpu, memory))
    lines = [
        "# Time and memory of the basic commands",
        "",
        "    python -m experiments.benchmarks.straight_line",
        "",
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; shared with other work, so "
        "CPU seconds stand beside wall seconds. Peak memory is that of the process.",
        "",
        "| what | aim | wall s | CPU s | peak MB |",
        "|---|---|---|---|---|",
        *(f"| {name} | {aim} | {wall:.2f} | {cpu:.2f} | {memory:,.0f} |" for name, aim, wall, cpu, memory in rows),
        "",
    ]
    args.out.parent.mkdir(exist_ok=True)
    overwrite(args.out, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
