"""More processes on this machine: they run the same command and take plans from the same queue."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, NamedTuple

from sensitivity.spec import threads
from sensitivity.spec.errors import Notice

if TYPE_CHECKING:
    from sensitivity.measure.loop import Step
    from sensitivity.spec.components import ComponentMap

CHILD = "SENSITIVITY_WORKER"  # environment variable of a worker, which starts no workers itself
FOLLOWS = "follows"  # its value if the worker's standard input closes when its launcher ends
WORTH = 20.0  # seconds of work left from which on workers join: they take about as long to load on a busy machine
APIECE = 1.5e9  # bytes that a worker needs beside its model and quantized weights


def is_child() -> bool:
    """Whether this process is a worker."""
    return CHILD in os.environ


def follow() -> None:
    """In a worker, stop as by Ctrl-C when the launcher ends, even by a kill: nobody else would stop it."""

    def watch() -> None:
        # returns when the pipe closes, which the kernel does when the launcher dies
        sys.stdin.buffer.read()
        _thread.interrupt_main()

    if os.environ.get(CHILD) == FOLLOWS:
        threading.Thread(target=watch, daemon=True).start()


def count(args: argparse.Namespace, parts: ComponentMap, plans: int, schemes: int) -> int:
    """How many processes work on this machine: the number given, or one per core as far as memory allows."""
    if args.workers != "auto":
        return int(args.workers)
    if args.device != "cpu" or args.plain or is_child():
        return 1
    # 8 bytes: the model's weights and those of the running plan in float32; 1.25 bytes: the codes of each scheme
    apiece = parts.numel * (8 + 1.25 * schemes) + APIECE
    room = int(0.8 * threads.free_memory() / apiece)
    return max(1, min(threads.cores() // (threads.requested() or 1), plans, room))


@contextlib.contextmanager
def sharing_cores(processes: int) -> Iterator[None]:
    """Divide the cores among the processes; with more threads than cores all would be slower."""
    import torch

    before = torch.get_num_threads()
    if processes > 1:
        torch.set_num_threads(threads.requested() or max(1, threads.cores() // processes))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def crew(args: argparse.Namespace, processes: int, steps: Iterator[Step]) -> Iterator[Iterator[Step]]:
    """The steps of this process, with workers beside it until the queue is empty; they stop when it stops.

    With a given number, workers start at once. With `auto`, they join when a step has shown that enough work is left.
    """
    at_work: list[Worker] = []
    others = 0 if is_child() else processes - 1

    def joined() -> Iterator[Step]:
        for step in steps:
            if not at_work and step.seconds / step.new * step.left > WORTH:
                at_work.extend(_another(args) for _ in range(others))
            yield step

    try:
        if args.workers != "auto":
            at_work.extend(_another(args) for _ in range(others))
        yield joined() if args.workers == "auto" else steps
        # this process has no plan left; workers may still run their last ones
        if ended := [worker for worker in at_work if worker.process.wait()]:
            why = "; ".join(worker.why() for worker in ended)
            told = f"{len(ended)} of the workers ended early ({why}); what they were running is run again"
            warnings.warn(told, Notice, stacklevel=2)
    finally:
        for process, told_by in at_work:
            if process.poll() is None:
                process.terminate()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
            told_by.close()


def _another(args: argparse.Namespace) -> Worker:
    """Start a worker: the same command, with this process's share of threads."""
    import torch

    told = tempfile.TemporaryFile()  # noqa: SIM115 - read when the worker has ended
    process = subprocess.Popen(
        [sys.executable, "-m", "sensitivity", *args.typed, "--json"],
        env={**os.environ, CHILD: FOLLOWS, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        # never written to: it closes when this process ends, which the worker waits for (see follow)
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=told,
    )
    return Worker(process, told)


class Worker(NamedTuple):
    """A worker process, and the file that receives its standard error."""

    process: subprocess.Popen[bytes]
    told: IO[bytes]

    def why(self) -> str:
        """How the process ended, and the error that it printed."""
        code = self.process.returncode
        self.told.seek(0)
        lines = self.told.read().decode(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.startswith("error: ")), "").removeprefix("error: ")
        return (f"signal {-code}" if code < 0 else f"status {code}") + (f", {last}" if last else "")
