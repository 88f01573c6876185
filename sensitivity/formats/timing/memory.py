"""Memory of this process, as Linux counts it: the peak, anonymous memory, and pages mapped from weight files."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TypedDict

PROCESS = Path("/proc/self")
LINE = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)
MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ +(/.*)$")


class Memory(TypedDict):
    """Bytes in memory."""

    peak: int  # the most since `begin_peak`
    anonymous: int
    mapped: int  # of files other than programs and libraries; the system may drop these pages and read them again


def memory_now() -> Memory | None:
    """The memory of this process now; None if this is not Linux."""
    if not (PROCESS / "smaps").exists():
        return None
    status = {name: 1024 * int(size) for name, size in LINE.findall((PROCESS / "status").read_text())}
    mapped = 0
    counted = False
    for line in (PROCESS / "smaps").read_text().splitlines():
        if found := MAPPING.match(line):
            counted = ".so" not in found[1] and "/bin/" not in found[1] and not found[1].startswith("/dev/")
        elif "-" in line.partition(" ")[0]:
            counted = False
        elif counted and line.startswith("Rss:"):
            mapped += 1024 * int(line.split()[1])
    return {"peak": status["VmHWM"], "anonymous": status["RssAnon"], "mapped": mapped}


def begin_peak() -> None:
    """Restart the count of the peak, if the system lets a process do so."""
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")


def resident() -> int:
    """All bytes of this process that are in memory now, libraries included; 0 if this is not Linux."""
    with contextlib.suppress(OSError):
        found = dict(LINE.findall((PROCESS / "status").read_text()))
        return 1024 * int(found["VmRSS"])
    return 0
