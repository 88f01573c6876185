"""How many threads and cores and how much memory this process may use; makes threads sleep while they wait."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

# By default, an OpenMP thread that waits for others spins. Beside another busy process it then occupies the core that
# the thread it waits for needs, and a sweep takes three times the CPU seconds. OpenMP and OpenBLAS read these variables
# once, when they are loaded, so they are set before torch and numpy are imported; values that the user has set stay.
ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0", "OPENBLAS_THREAD_TIMEOUT": "4"}
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time per period, and the period


def sleep_while_waiting() -> None:
    """Make waiting threads sleep instead of spin; call it before torch and numpy are imported."""
    for name, value in ASLEEP.items():
        os.environ.setdefault(name, value)


def threads_in_words(count: int) -> str:
    """A number of threads, such as "1 thread"."""
    return f"{count} thread{'s' if count > 1 else ''}"


def cores() -> int:
    """The cores that this process may use: fewer than the machine has in a container or under an affinity mask."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, min(ours, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return ours


def free_memory() -> int:
    """Bytes of memory that are free or can be freed; without /proc/meminfo, half of all memory; on Windows, 4 GiB."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 4 << 30


def limit(count: int) -> None:
    """Use this many threads, in this process and in those that it starts."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:  # torch reads the environment only when it is loaded
        import torch

        torch.set_num_threads(count)


def requested() -> int | None:
    """How many threads the user asked for with OMP_NUM_THREADS; None if it is not set."""
    value = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(value) if value.isdigit() and int(value) else None


def one_for_linear_algebra() -> AbstractContextManager[Any]:
    """Linear algebra in one thread: with matrices of some hundred rows, others take CPU time and save none."""
    controller: AbstractContextManager[Any] = _libraries().limit(limits=1, user_api="blas")
    return controller


@cache
def _libraries() -> Any:
    """The libraries of linear algebra that are loaded; to find them takes milliseconds."""
    from threadpoolctl import ThreadpoolController  # imported when it is needed: numpy is loaded then

    return ThreadpoolController()
