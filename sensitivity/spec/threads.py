"""Threads: how many of this machine's cores are ours, and that a thread which waits sleeps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# A thread of OpenMP that waits for others spins, by default: beside another busy process it takes the core that the one
# it waits for needs, and a sweep takes three times the CPU seconds. OpenMP and OpenBLAS read this once, as they are
# loaded, so that it is said before torch and numpy are imported; what the user has set stays.
ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0", "OPENBLAS_THREAD_TIMEOUT": "4"}
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time, and in how many


def sleep_while_waiting() -> None:
    for name, value in ASLEEP.items():
        os.environ.setdefault(name, value)


def cores() -> int:
    """Cores that this process may use: fewer than the machine's in a container, or where it was pinned to some."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, min(ours, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return ours


def available() -> int:
    """Bytes of memory that nobody uses."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 4 << 30


def limit(count: int) -> None:
    """Compute with so many threads, here and in processes that are started from here."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:  # it has read the environment before
        import torch

        torch.set_num_threads(count)


def limited() -> int | None:
    """How many threads the user wants, if that was said."""
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(said) if said.isdigit() and int(said) else None
