"""More processes on this machine: the same command, started again, takes from the same queue."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator

from sensitivity.errors import Notice, UserError

CHILD = "SENSITIVITY_WORKER"  # set for a worker, which starts none of its own
FOLLOWS = "follows"  # its value where the worker's standard input closes when its launcher is gone


def is_child() -> bool:
    return CHILD in os.environ


def follow() -> None:
    """Stop as by Ctrl-C when the launcher is gone, however it went: nobody would know of this process."""

    def watch() -> None:
        sys.stdin.buffer.read()
        _thread.interrupt_main()

    if os.environ.get(CHILD) == FOLLOWS:
        threading.Thread(target=watch, daemon=True).start()


def share_cores(count: int) -> None:
    """Each process computes with its share of the cores; more threads than cores are slower than fewer."""
    if count < 1:
        raise UserError(f"--workers takes a number from 1 up, not {count}")
    if count > 1:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))


@contextlib.contextmanager
def crew(args: argparse.Namespace) -> Iterator[None]:
    """Workers beside this process, until the queue is empty; they end with it when it is stopped."""
    count = 0 if is_child() else args.workers - 1
    command = [sys.executable, "-m", "sensitivity", *args.typed, "--json"]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, CHILD: FOLLOWS}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(count)
    ]  # fmt: skip
    try:
        yield
        if ended := [process.returncode for process in processes if process.wait()]:
            why = ", ".join(f"signal {-code}" if code < 0 else f"status {code}" for code in ended)
            told = f"{len(ended)} of the workers ended early ({why}); what they were running is run again"
            warnings.warn(told, Notice, stacklevel=2)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
