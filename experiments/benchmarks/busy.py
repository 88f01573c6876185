"""Busy: what the demo takes on this machine when it is quiet, beside one busy process and beside two; before and after.

    python -m experiments.benchmarks.busy --before COMMIT

Each line is a whole `sensitivity demo` in a process of its own, into a folder of its own, off a terminal. `--before`
also runs that commit once, from a git worktree in a temporary folder, with the same Python and packages.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPIN = "while True: pass"
AIM_CPU, AIM_WALL, AIM_FIRST, AIM_PAUSE = 1.3, 2.5, 5.0, 10.0


@dataclass
class Run:
    """One demo: what it took, and when it printed something."""

    beside: int
    wall: float = 0.0
    cpu: float = 0.0
    status: int | None = None
    told: list[float] = field(default_factory=list)  # seconds since the start

    @property
    def first(self) -> float:
        return self.told[0] if self.told else self.wall

    @property
    def pause(self) -> float:
        """The longest time without a line."""
        moments = [0.0, *self.told, self.wall]
        return max(after - before for before, after in pairwise(moments))


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def demo(code: Path, beside: int, n: int | None) -> Run:
    found = Run(beside)
    with tempfile.TemporaryDirectory() as folder, busy(beside):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "sensitivity", "demo", *(["--n", str(n)] if n else []), "--out", f"{folder}/demo"],
            cwd=code,
            env={**os.environ, "PYTHONPATH": str(code)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        reader = threading.Thread(target=_follow, args=(process, found, began))
        reader.start()
        found.status = process.wait()
        found.wall = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # the busy ones are not waited for yet
        found.cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        reader.join()
    return found


def _follow(process: subprocess.Popen[bytes], found: Run, began: float) -> None:
    assert process.stdout
    for _ in process.stdout:
        found.told.append(time.monotonic() - began)


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", str(code), commit], cwd=ROOT, check=True)
        try:
            yield code
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(code)], cwd=ROOT, check=True)


def rows(name: str, runs: list[Run]) -> list[str]:
    least, quiet = min(run.cpu for run in runs), next((run.wall for run in runs if not run.beside), None)
    return [
        f"| {name} | {run.beside} | {run.wall:.0f} | {f'{run.wall / quiet:.1f}' if quiet else ''} | {run.cpu:.0f}"
        f" | {run.cpu / least:.2f} | {run.first:.1f} | {run.pause:.1f} |"
        for run in runs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--beside", default="0,1,2", help="busy processes beside it (default: 0,1,2)")
    parser.add_argument("--n", type=int, help="examples of the demo (default: what each commit's demo takes by itself)")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "busy.md")
    args = parser.parse_args()
    counts = [int(count) for count in args.beside.split(",")]
    found = {"now": [demo(ROOT, count, args.n) for count in counts]}
    if args.before:
        with checked_out(args.before) as code:
            found["before"] = [demo(code, counts[0], args.n)]  # once: beside others it takes half an hour
    if failed := [run for runs in found.values() for run in runs if run.status]:
        sys.exit(f"{len(failed)} of the demos failed")
    words = " ".join(["python -m experiments.benchmarks.busy", *sys.argv[1:]])
    lines = [
        "# The demo on a busy machine",
        "",
        f"`{words}`: {os.cpu_count()} cores ({platform.machine()}), load average at the end {os.getloadavg()[0]:.1f}; "
        f"{args.n or 'the default number of'} examples; aims: CPU at most {AIM_CPU} times the "
        f"least; wall at most {AIM_WALL} times the quiet one where half the machine is taken; a first line within "
        f"{AIM_FIRST:.0f} s, then one at least every {AIM_PAUSE:.0f} s.",
        "",
        "| code | busy processes beside it | wall, s | times the quiet one | CPU, s | times the least | first line, s |"
        " longest silence, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row for name, runs in found.items() for row in rows(name, runs)),
    ]
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
