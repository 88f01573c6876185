"""More processes on this machine: the same command, started again, takes from the same queue."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sensitivity import threads
from sensitivity.errors import Notice

if TYPE_CHECKING:
    from sensitivity.components import ComponentMap
    from sensitivity.sweep import Step

CHILD = "SENSITIVITY_WORKER"  # set for a worker, which starts none of its own
WORTH = 20.0  # seconds of work that must be left for others to join: loading takes them that long on a busy machine
APIECE = 1.5e9  # bytes that a worker holds beside its model and the codes of quantized weights


def is_child() -> bool:
    return CHILD in os.environ


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
    at_work: list[subprocess.Popen[bytes]] = []
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
        if ended := [process.returncode for process in at_work if process.wait()]:
            why = ", ".join(f"signal {-code}" if code < 0 else f"status {code}" for code in ended)
            told = f"{len(ended)} of the workers ended early ({why}); what they were running is run again"
            warnings.warn(told, Notice, stacklevel=2)
    finally:
        for process in at_work:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _another(args: argparse.Namespace) -> subprocess.Popen[bytes]:
    import torch

    return subprocess.Popen(
        [sys.executable, "-m", "sensitivity", *args.typed, "--json"],
        env={**os.environ, CHILD: "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
