"""What a machine may do to a sweep: a database that stops, a full disk, little memory, stale locks, crashed trials."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from experiments.small.disturbed import SWEEP, WHOLE, Command, Found, Undisturbed, leftovers, same_study
from experiments.small.postgres import Postgres, initdb
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import discard
from sensitivity.study.storage.process_lock import ProcessLock
from sensitivity.study.study import Study


def postgres(plain: Undisturbed, folder: Path, found: Found, draw: random.Random) -> None:
    """Two launchers on a database that is stopped and started again, six times."""
    with tempfile.TemporaryDirectory() as data:  # open to the server's own user
        server = Postgres(Path(data))
        server.start()
        try:
            words = (*SWEEP.split(), str(folder / "study"), "--storage", server.url)
            launchers = [Command(folder, *words) for _ in range(2)]
            while not list((folder / "study" / "examples").glob("[!.]*.parquet")):  # a first start is not waited for
                time.sleep(0.05)
            stops = 0
            while stops < 6 and not all(one.ended() for one in launchers):
                time.sleep(draw.uniform(0, plain.seconds["sweep"] / 3))
                server.stop()
                time.sleep(draw.uniform(0, 3))
                server.start()
                stops += 1
            for one in launchers:
                found.check(one.wait() == 0, one.said())
            found.sent["stops"] = stops
            same_study(found, folder / "study", plain.bare)
        finally:
            server.stop()


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system in memory that is as small as is said; what is yielded makes it larger."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(plain: Undisturbed, folder: Path, found: Found, draw: random.Random) -> None:
    """The same sweep on a disk that is full again and again, then an export and a report that do not fit."""
    disk = folder / "disk"
    disk.mkdir()
    with small_disk(disk, "16k") as grow:
        command = Command(folder, *SWEEP.split(), str(disk / "study"))
        for size in (*range(24, 160, draw.randrange(12, 20)), 4096):
            sentence(found, command, OSError.__name__)
            found.sent["full disks"] = found.sent.get("full disks", 0) + (command.status != 0)
            grow(f"{size}k")
            command = Command(folder, *SWEEP.split(), str(disk / "study"))
        found.check(command.wait() == 0, command.said())
        same_study(found, disk / "study", plain.bare)
        for name in ("report", "export"):  # an export is noted in the study, and the report tells of it
            space = os.statvfs(disk)
            grow(str((space.f_blocks - space.f_bfree) * space.f_frsize + 200_000))
            command = Command(folder, *plain.words(name, disk / name))
            sentence(found, command, OSError.__name__)
            found.sent["full disks"] += command.status != 0
            if name == "export":
                found.check(not (disk / name).exists(), "an export on a full disk is there in part")
            grow("64m")
            command = Command(folder, *plain.words(name, disk / name))
            found.check(command.wait() == 0, command.said())
            WHOLE[name](found, disk / name, plain.folder / name, True)
            found.check(not (some := leftovers(disk)), f"{some} were left")


ABORTED = "cannot allocate memory for thread-local data: ABORT"  # what glibc prints before it ends the process


def sentence(found: Found, command: Command, kind: str) -> None:
    """It ended well, or in one sentence on both streams: no traceback, no bare errno, no defect."""
    status, said = command.wait(), command.said()
    if ABORTED in said:  # like a kill, nothing in the process learns of it; what it left is compared later
        found.sent["aborts by the C library"] = found.sent.get("aborts by the C library", 0) + 1
        return
    bad = [word for word in ("Traceback", "a defect", "[Errno", kind) if word in said]
    found.check(status == 0 or ('"error"' in said and not bad), f"status {status}: {said}")


def little_memory(plain: Undisturbed, folder: Path, found: Found, draw: random.Random) -> None:
    """Address space that ends somewhere between what a process has at its start and what the sweep needs."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for _ in range(8):
        most = has + int(draw.uniform(0, 60e6))
        command = Command(folder, *SWEEP.split(), str(folder / "study"), limit=lambda most=most: limit_memory(most))
        sentence(found, command, MemoryError.__name__)
        found.sent["out of memory"] = found.sent.get("out of memory", 0) + (command.status != 0)
    command = Command(folder, *SWEEP.split(), str(folder / "study"))
    found.check(command.wait() == 0, command.said())
    same_study(found, folder / "study", plain.bare)


def limit_memory(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def stale_locks(plain: Undisturbed, folder: Path, found: Found, draw: random.Random) -> None:
    """Lock files of every kind lie there, and a process is killed while it holds both locks; nobody waits for them."""
    out = folder / "study"
    out.mkdir()
    holder = os.fork()
    if holder == 0:
        for name in ("journal.log", "queue"):
            ProcessLock(out / name).acquire()
        (out / "held").touch()
        time.sleep(3600)
    while not (out / "held").exists():
        time.sleep(0.01)
    discard(out / "held", ours=True)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    for name in ("journal.log.lock", "journal.lock", "queue.lock"):
        (out / name).touch()
    began = time.monotonic()
    command = Command(folder, *SWEEP.split(), str(out))
    found.check(command.wait() == 0, command.said())
    seconds = time.monotonic() - began
    found.check(seconds < 2 * plain.seconds["sweep"] + 10, f"it waited for a stale lock: {seconds:.0f} s")
    found.sent["stale locks"] = 5
    same_study(found, out, plain.bare)


def crashed_trials(plain: Undisturbed, folder: Path, found: Found, draw: random.Random) -> None:
    """Killed with a trial surely running, twice each trial number; the same trials are run, under the same numbers."""
    out = folder / "study"
    for _ in range(4):
        command = Command(folder, *SWEEP.split(), str(out))
        while not command.ended():
            with contextlib.suppress(UserError):
                if Study(out).counts()["running"]:
                    break
        os.kill(command.pid, signal.SIGKILL)
        command.wait()
        found.check(Study(out).counts()["running"] == 1, "no trial was running")
        found.sent["crashes"] = found.sent.get("crashes", 0) + 1
    command = Command(folder, *SWEEP.split(), str(out))
    found.check(command.wait() == 0, command.said())
    found.check(len(Study(out).optuna_study.get_trials()) == len(Study(plain.bare).trials()), "trials were doubled")
    same_study(found, out, plain.bare)


MACHINE: dict[str, Callable[[Undisturbed, Path, Found, random.Random], None]] = {
    "PostgreSQL stopped and started": postgres, "full disk": full_disk, "little memory": little_memory,
    "stale locks (Optuna issue 5921)": stale_locks, "crashed trials (Optuna issue 6283)": crashed_trials,
}  # fmt: skip


def possible(name: str) -> bool:
    return (initdb() is not None) if "Postgre" in name else os.getuid() == 0 if name == "full disk" else True


def machine(plain: Undisturbed, seed: int, names: Iterable[str] = MACHINE) -> Iterator[dict[str, Found]]:
    for name in filter(possible, names):
        found = Found()
        with tempfile.TemporaryDirectory() as folder:
            try:
                MACHINE[name](plain, Path(folder), found, random.Random(seed))
            except Exception as error:
                found.wrong.append(f"{type(error).__name__}: {error}")
        print(name, found, flush=True)
        yield {name: found}
