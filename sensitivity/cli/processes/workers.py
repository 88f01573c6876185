"""Additional processes on this machine: they run the same command and take plans from the same queue."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, NamedTuple

from sensitivity.spec import threads
from sensitivity.spec.errors import Notice

if TYPE_CHECKING:
    from sensitivity.measure.loop import Step
    from sensitivity.spec.components import ComponentMap

CHILD = "SENSITIVITY_WORKER"  # environment variable of a worker, which starts no workers itself
STOPS_WITH_LAUNCHER = "follows"  # its value if the worker's standard input closes when its launcher ends
# workers join if more seconds of work than this are left: on a busy machine they take about as long to load
WORTH_A_WORKER = 20.0
SECONDS_TO_STOP = 5.0  # for a worker to end cleanly after its launcher is gone; a kill loses only its plan
BYTES_PER_WORKER = 1.5e9  # beside its model and quantized weights


def is_child() -> bool:
    """Whether this process is a worker."""
    return CHILD in os.environ


def stop_with_launcher() -> None:
    """In a worker, stop as by Ctrl-C when the launcher ends, even by a kill: nobody else would stop it."""

    def watch() -> None:
        # returns when the pipe closes, which the kernel does when the launcher dies; not sys.stdin.read, whose lock a
        # thread would still hold when this process ends, which aborts it
        os.read(sys.stdin.fileno(), 1)
        _thread.interrupt_main()
        time.sleep(SECONDS_TO_STOP)
        # still here: the interrupt came where libraries swallow it (a bare `except` at import, a finalizer)
        os._exit(130)

    if os.environ.get(CHILD) == STOPS_WITH_LAUNCHER:
        # a shell starts its background jobs with SIGINT ignored, and then an interrupt would do nothing
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=watch, daemon=True).start()


def count(args: argparse.Namespace, parts: ComponentMap, plans: int, schemes: int) -> int:
    """How many processes work on this machine: the number given, or one per core as far as memory allows."""
    if args.workers != "auto":
        return int(args.workers)
    if args.device != "cpu" or args.plain or is_child():
        return 1
    # per weight: 8 bytes for the model and the running plan in float32, and 1.25 bytes for the codes of each scheme
    bytes_of_one = parts.numel * (8 + 1.25 * schemes) + BYTES_PER_WORKER
    fit_in_memory = int(0.8 * threads.free_memory() / bytes_of_one)
    return max(1, min(threads.cores() // (threads.requested() or 1), plans, fit_in_memory))


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
def beside_workers(args: argparse.Namespace, processes: int, steps: Iterator[Step]) -> Iterator[Iterator[Step]]:
    """The steps of this process, with workers beside it until the queue is empty; they stop when it stops.

    With a given number, workers start at once. With `auto`, they join when a step has shown that enough work is left.
    """
    at_work: list[Worker] = []
    others = 0 if is_child() else processes - 1

    def joined() -> Iterator[Step]:
        for step in steps:
            if not at_work and step.seconds / step.new * step.left > WORTH_A_WORKER:
                at_work.extend(_start_worker(args) for _ in range(others))
            yield step

    try:
        if args.workers != "auto":
            at_work.extend(_start_worker(args) for _ in range(others))
        yield joined() if args.workers == "auto" else steps
        # this process has no plan left; workers may still run their last ones
        if ended := [worker for worker in at_work if worker.process.wait()]:
            how_it_ended = "; ".join(worker.how_it_ended() for worker in ended)
            message = f"{len(ended)} of the workers ended early ({how_it_ended}); what they were running is run again"
            warnings.warn(message, Notice, stacklevel=2)
    finally:
        for process, stderr_file in at_work:
            if process.poll() is None:
                process.terminate()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
            stderr_file.close()


def _start_worker(args: argparse.Namespace) -> Worker:
    """Start a worker: the same command, with this process's share of threads."""
    import torch

    stderr = tempfile.TemporaryFile()  # noqa: SIM115 - read when the worker has ended
    process = subprocess.Popen(
        [sys.executable, "-m", "sensitivity", *args.argv, "--json"],
        env={**os.environ, CHILD: STOPS_WITH_LAUNCHER, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        # never written to: it closes when this process ends, which the worker waits for (see stop_with_launcher)
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )
    return Worker(process, stderr)


class Worker(NamedTuple):
    """A worker process, and the file that receives its standard error."""

    process: subprocess.Popen[bytes]
    stderr: IO[bytes]

    def how_it_ended(self) -> str:
        """How the process ended, and the error that it printed."""
        code = self.process.returncode
        self.stderr.seek(0)
        last = ""
        for line in self.stderr.read().decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError, AttributeError):  # a line that compiled code wrote
                last = json.loads(line).get("error", last)
        return (f"signal {-code}" if code < 0 else f"status {code}") + (f", {last}" if last else "")
