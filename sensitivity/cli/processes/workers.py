"""More processes on this machine: the same command, started again, takes from the same queue."""

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

CHILD = "SENSITIVITY_WORKER"  # set for a worker, which starts none of its own
FOLLOWS = "follows"  # its value where the worker's standard input closes when its launcher is gone
WORTH = 20.0  # seconds of work that must be left for others to join: loading takes them that long on a busy machine
APIECE = 1.5e9  # bytes that a worker holds beside its model and the codes of quantized weights


def is_child() -> bool:
    return CHILD in os.environ


def follow() -> None:
    """Stop as by Ctrl-C when the launcher is gone, however it went: nobody would know of this process."""

    def watch() -> None:
        sys.stdin.buffer.read()
        _thread.interrupt_main()

    if os.environ.get(CHILD) == FOLLOWS:
        threading.Thread(target=watch, daemon=True).start()


def count(args: argparse.Namespace, parts: ComponentMap, plans: int, schemes: int) -> int:
    """How many processes are to work on this machine: as named, or one for each core that memory allows."""
    if args.workers != "auto":
        return int(args.workers)
    if args.device != "cpu" or args.plain or is_child():
        return 1
    # float32 twice: the model's own weights and those of the plan that is running
    apiece = parts.numel * (8 + 1.25 * schemes) + APIECE
    room = int(0.8 * threads.available() / apiece)
    return max(1, min(threads.cores() // (threads.limited() or 1), plans, room))


@contextlib.contextmanager
def sharing_cores(processes: int) -> Iterator[None]:
    """Each process computes with its share of the cores; more threads than cores are slower than fewer."""
    import torch

    before = torch.get_num_threads()
    if processes > 1:
        torch.set_num_threads(threads.limited() or max(1, threads.cores() // processes))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def crew(args: argparse.Namespace, processes: int, steps: Iterator[Step]) -> Iterator[Iterator[Step]]:
    """The steps, with workers beside this process until the queue is empty; they end with it when it is stopped.

    A number that was named starts at once. Where it was not, they join when a step has shown that it is worth it.
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
    import torch

    told = tempfile.TemporaryFile()  # noqa: SIM115 - read when the worker has ended
    process = subprocess.Popen(
        [sys.executable, "-m", "sensitivity", *args.typed, "--json"],
        env={**os.environ, CHILD: FOLLOWS, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=told,
    )
    return Worker(process, told)


class Worker(NamedTuple):
    """A process beside this one, and what it writes to standard error."""

    process: subprocess.Popen[bytes]
    told: IO[bytes]

    def why(self) -> str:
        """How it ended, and its last words."""
        code = self.process.returncode
        self.told.seek(0)
        lines = self.told.read().decode(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.startswith("error: ")), "").removeprefix("error: ")
        return (f"signal {-code}" if code < 0 else f"status {code}") + (f", {last}" if last else "")
