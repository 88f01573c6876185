"""Commands as processes that can be disturbed, and what they leave compared with what undisturbed ones left."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: processes are forked, and share the machine

import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

# what the commands import on their way, so that they begin with it: a limit of memory then falls into their work
from sensitivity.analysis.reporting import page  # noqa: F401
from sensitivity.api import exporting, recommending, sweeping  # noqa: F401
from sensitivity.cli.main import main
from sensitivity.spec.errors import UserError
from sensitivity.study.storage.opening import close
from sensitivity.study.study import Study

SWEEP = "sweep embedded:scenes-llava --bits 2,8 --method rtn --symmetric --n 20 --json --out"
EVERY = ("export", "report", "import")  # that write something outside of the study
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Command:
    """A command in a process of its own, which leads a group, so that its workers can be found and are never left."""

    def __init__(self, folder: Path, *words: str, limit: Callable[[], None] = lambda: None) -> None:
        self.log = folder / f"{time.monotonic_ns()}.log"
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for name in SIGNALS[1:]:
                signal.signal(name, signal.default_int_handler if name == signal.SIGINT else signal.SIG_DFL)
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT)
            os.dup2(out, 1)
            os.dup2(out, 2)
            limit()
            status = 1
            with contextlib.suppress(SystemExit):
                status = main(list(words))
            os._exit(status)
        self.status: int | None = None

    def ended(self) -> bool:
        if self.status is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(found[1])
        return self.status is not None

    def wait(self, seconds: float = 600) -> int:
        until = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > until:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"it did not end within {seconds:g} s: {self.said()}")
            time.sleep(0.01)
        assert self.status is not None
        return self.status

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def members(self) -> list[int]:
        """The processes of its group that still live, itself included."""
        found = subprocess.run(["ps", "-o", "pid=,stat=", "-g", str(self.pid)], capture_output=True, text=True).stdout
        return [int(line.split()[0]) for line in found.splitlines() if "Z" not in line.split()[1]]


@dataclass
class Found:
    """What a place was put through, and what was wrong afterwards."""

    sent: dict[str, int] = field(default_factory=dict)
    rounds: int = 0  # compared with the undisturbed result
    wrong: list[str] = field(default_factory=list)

    def check(self, right: bool, what: str) -> None:
        if not right:
            self.wrong.append(what)


class Undisturbed:
    """The results of the same commands that nobody disturbs, and how long each takes."""

    def __init__(self, folder: Path, names: Container[str] = EVERY) -> None:
        self.folder, self.study, self.seconds = folder, folder / "study", dict[str, float]()
        self.table = folder / "table.csv"
        rows = "".join(
            f"{a},{b},{(a + b) / 16 + i / 1000}\n" for a in (2, 3, 4, 8) for b in (2, 4, 8) for i in range(9)
        )
        self.table.write_text("vit,llm,cider\n" + rows)
        shutil.copytree(self._run("sweep", *SWEEP.split(), str(self.study)), self.bare)
        written = [name for name in EVERY if name in names]
        if written:
            self._run("recommend", *self.words("recommend", self.study))
            shutil.copytree(self.study, self.reported)  # exports are noted in the study, and its report tells of them
        for name in written:
            self._run(name, *self.words(name, folder / name))

    @property
    def bare(self) -> Path:
        """The study as the sweep left it, before anything was recommended."""
        return self.folder / "bare"

    @property
    def reported(self) -> Path:
        """The study as it was recommended from, before anything was exported."""
        return self.folder / "reported" / "study"

    def words(self, name: str, out: Path) -> list[str]:
        plan, importing = self.study / "plan.json", "--part vit=vision --part llm=language --score cider"
        return {
            "recommend": ["recommend", str(out), "--bpw", "5", "--json"],
            "export": ["export", str(plan), "--format", "compressed-tensors", "--force", "--out", str(out), "--json"],
            "report": ["report", str(self.reported), "--out", str(out), "--json"],
            "import": ["import", str(self.table), *importing.split(), "--out", str(out), "--json"],
        }[name]

    def _run(self, name: str, *words: str) -> Path:
        began = time.monotonic()
        command = Command(self.folder, *words)
        assert command.wait() == 0, command.said()
        self.seconds[name] = time.monotonic() - began
        return self.study


def same_study(found: Found, out: Path, right: Path) -> None:
    """The table number by number, and the answers example by example."""
    ours, theirs = Study(out), Study(right)
    done = len(theirs.trials())
    found.check(ours.counts() == {"done": done, "waiting": 0, "running": 0}, f"{out}: {ours.counts()} of {done}")
    tables = [one.table().drop(columns=["number", "seconds"], errors="ignore") for one in (ours, theirs)]
    order = [column for column in ("key", "cider") if column in tables[0]]
    tables = [table.sort_values(order, ignore_index=True) for table in tables]
    with _telling(found, f"{out}: the table differs"):
        pd.testing.assert_frame_equal(*tables, check_exact=True)
    for file in sorted((right / "examples").glob("*.parquet")):
        with _telling(found, f"{out}: the answers of {file.stem} differ"):
            both = [pd.read_parquet(one / "examples" / file.name) for one in (out, right)]
            pd.testing.assert_frame_equal(*(b.sort_values(["task", "example"], ignore_index=True) for b in both))
    close(ours._storage)
    close(theirs._storage)
    found.rounds += 1


@contextlib.contextmanager
def _telling(found: Found, what: str) -> Iterator[None]:
    try:
        yield
    except (AssertionError, OSError, KeyError) as error:
        found.wrong.append(f"{what}: {str(error)[:300]}")


VOLATILE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC|[\w./-]*/(study|again\d*|bare)\b")  # when, and where


def content(folder: Path) -> dict[str, str]:
    """All that lies in a folder, without when and where it was made."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): VOLATILE.sub("", file.read_bytes().decode("latin-1")) for file in files}


def leftovers(out: Path) -> list[str]:
    """Hidden files, under which unfinished ones grow."""
    return [str(one.relative_to(out)) for one in out.rglob(".*")]


def whole_folder(found: Found, out: Path, right: Path, ended: bool) -> None:
    if ended or out.exists():
        ours, theirs = content(out), content(right)
        differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        found.check(not differ, f"{out}: {differ} differ after it {'ended' if ended else 'was killed'}")
    found.rounds += ended


def whole_report(found: Found, out: Path, right: Path, ended: bool) -> None:
    """Its files come one by one, the page last: each is whole, and with the page all are there."""
    ours, theirs = content(out) if out.exists() else {}, content(right)
    seen = {name for name in ours if not Path(name).name.startswith(".")}
    found.check(not (wrong := sorted(n for n in seen if ours[n] != theirs.get(n))), f"{out}: {wrong} differ")
    if ended or "index.html" in seen:
        found.check(seen == theirs.keys(), f"{out}: {sorted(theirs.keys() ^ seen)} are missing or too much")
    found.rounds += ended


def whole_plan(found: Found, out: Path, right: Path, ended: bool) -> None:
    if ended or (out / "plan.json").exists():
        plans = [json.loads((one / "plan.json").read_bytes()) for one in (out, right)]
        found.check(plans[0] == plans[1], f"{out}: the plan differs")
    if ended:
        same_study(found, out / "verify", right / "verify")


def whole_import(found: Found, out: Path, right: Path, ended: bool) -> None:
    """A study of a table is all of its rows, or no study."""
    try:
        study = Study(out)
    except UserError as error:
        found.check(not ended, f"{out}: {error}")
    else:
        rows = len(study.trials())
        found.check(rows == len(Study(right).trials()), f"{out}: a study of {rows} rows")
    if ended:
        same_study(found, out, right)


WHOLE: dict[str, Callable[[Found, Path, Path, bool], None]] = {
    "export": whole_folder, "report": whole_report, "recommend": whole_plan, "import": whole_import,
}  # fmt: skip
