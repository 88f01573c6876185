"""The study: queueing, resuming, what a killed process leaves behind, and two processes on one study."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.storage.opening import close, open_storage
from sensitivity.study.storage.process_lock import ProcessLock
from sensitivity.study.study import Study
from sensitivity.study.trial_cache import TrialCache

PARTS = ComponentMap(
    "toy", "part",
    tuple(Weight(f"{part}.weight", 8, 8, part, None, 0, None) for part in ("vision", "connector", "language")), (),
)  # fmt: skip
NATIVE = Plan.uniform(PARTS, None)
PLANS = [Plan.of(PARTS, {"vision": Scheme("rtn", a), "language": Scheme("rtn", b)}) for a in (2, 4) for b in (2, 4, 8)]


def rows(plan: Plan, task: str = "vqa", n: int = 60) -> dict[str, list[Any]]:
    """Examples that depend on the plan alone: more bits, more right answers."""
    bits = sum(plan.bits().values())
    right = np.random.default_rng(0).random(n) < bits / 48
    return {
        "task": [task] * n, "example": [f"e{i}" for i in range(n)], "cluster": [f"s{i // 3}" for i in range(n)],
        "kind": ["all"] * n, "score": right.astype(float).tolist(), "nll": [1 / bits] * n, "answer": ["x"] * n,
    }  # fmt: skip


def new(path: Path, **meta: Any) -> Study:
    return Study.create(path, PARTS, ["vqa"], {"model": "toy", **meta})


def drain(study: Study, pause: float = 0) -> int:
    done = 0
    while (asked := study.ask()) is not None:
        time.sleep(pause)
        study.tell(asked, rows(asked.plan), {"seconds": 0.1})
        done += 1
    return done


def facts(study: Study) -> dict[str, dict[str, Any]]:
    """What a table says, apart from when and by whom it was measured."""
    table = study.table().drop(columns=["number", "seconds"]).set_index("key").sort_index()
    return json.loads(table.to_json(orient="index"))  # type: ignore[no-any-return]


def test_each_plan_is_run_once(tmp_path: Path) -> None:
    study = new(tmp_path)
    assert study.enqueue([NATIVE, *PLANS, *PLANS]) == 7
    assert drain(study) == 7
    assert study.enqueue(PLANS) == 0
    assert Study(tmp_path).counts() == {"done": 7, "waiting": 0, "running": 0}


def test_scores_are_paired_with_full_precision(tmp_path: Path) -> None:
    study = new(tmp_path)
    study.enqueue([PLANS[0], NATIVE])  # deltas are there although full precision came second
    drain(study)
    table = study.table().set_index("key")
    mine, base = rows(PLANS[0])["score"], rows(NATIVE)["score"]
    assert table.loc[PLANS[0].key, "vqa.delta"] == pytest.approx(np.mean(mine) - np.mean(base))
    assert table.loc[PLANS[0].key, "vqa.delta.low"] < table.loc[PLANS[0].key, "vqa.delta"]
    assert list(table.loc[NATIVE.key, ["vqa.delta", "vqa.delta.low", "vqa.delta.high"]]) == [0, 0, 0]
    assert table.loc[PLANS[0].key, "vision"] == 2
    assert table.loc[PLANS[0].key, "connector"] == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model": "other"}, "model: there toy, here other"), ({"seed": 1}, "seed: there None, here 1")],
)
def test_another_model_or_seed_is_refused_with_the_difference(tmp_path: Path, change: Any, message: str) -> None:
    new(tmp_path)
    with pytest.raises(UserError, match=f"holds another study \\({message}\\); choose another --out"):
        Study.create(tmp_path, PARTS, ["vqa"], {"model": "toy", **change})


def test_other_tasks_and_granularity_are_refused(tmp_path: Path) -> None:
    new(tmp_path)
    with pytest.raises(UserError, match=r"tasks: there .'vqa'., here .'caption'."):
        Study.create(tmp_path, PARTS, ["caption"], {"model": "toy"})
    with pytest.raises(UserError, match="by: there part, here linear"):
        Study.create(tmp_path, PARTS.regroup("linear"), ["vqa"], {"model": "toy"})


def test_no_study_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no study at .*; `sensitivity sweep MODEL --out .*` makes one"):
        Study(tmp_path / "nothing")


def test_a_half_written_last_line_is_cut_off(tmp_path: Path) -> None:
    study = new(tmp_path)
    study.enqueue([NATIVE, PLANS[0]])
    asked = study.ask()
    assert asked is not None
    study.tell(asked, rows(asked.plan), {})
    journal = tmp_path / "journal.log"
    whole = journal.read_bytes()
    for broken in (b'{"op_code": 5, "worker', b"x" * 200_000):
        journal.write_bytes(whole + broken)
        again = Study(tmp_path)
        assert again.counts()["done"] == 1
    assert drain(again) == 1
    assert Study(tmp_path).counts()["done"] == 2


def test_a_line_that_another_process_left_half_written_is_not_appended_to(tmp_path: Path) -> None:
    """It was killed, or its disk was full, while this process goes on without opening the journal again."""
    study = new(tmp_path)
    study.enqueue([NATIVE])
    with open(tmp_path / "journal.log", "ab") as journal:
        journal.write(b'{"op_code": 5, "worker')
    assert drain(study) == 1
    assert facts(Study(tmp_path)) == facts(study)


def test_a_journal_that_is_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.log").write_text("not json\nnor this\n")
    with pytest.raises(UserError, match=r"journal\.log is not a study's journal, or is damaged"):
        Study(tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from sensitivity.study.storage.process_lock import ProcessLock
lock = ProcessLock(Path(sys.argv[1])); lock.acquire(); print("held", flush=True); time.sleep(60)
"""


def test_a_lock_of_a_killed_process_is_gone_with_it(tmp_path: Path) -> None:
    study = new(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "journal.log")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    began = time.monotonic()
    assert study.enqueue([NATIVE]) == 1
    assert time.monotonic() - began < 20  # Optuna's own locks would wait half a minute


def test_where_the_file_system_has_no_locks_files_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.chdir(tmp_path)
    study = new(Path("relative/study"))
    study.enqueue([NATIVE])
    assert drain(study) == 1
    assert not list(tmp_path.rglob("*.lock"))


def refused(work: Callable[[], object]) -> str:
    """What an error says that must come soon: a lock that is waited for without end would hang the tests."""
    said: list[str] = []

    def watched() -> None:
        try:
            work()
        except (UserError, OSError) as error:
            said.append(str(error))

    thread = threading.Thread(target=watched, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    return said[0]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make a file")
@pytest.mark.parametrize("use", [lambda file: ProcessLock(file).acquire(), open_storage])
def test_where_no_file_can_be_made_nobody_waits_for_a_lock(use: Callable[[Path], object]) -> None:
    assert refused(lambda: use(Path("/proc/x.parquet"))).startswith("cannot use /proc/x.parquet: ")


def test_a_study_whose_folder_is_gone_is_not_begun_again(tmp_path: Path) -> None:
    study = new(tmp_path / "gone")
    shutil.rmtree(study.path)
    for work in (lambda: study.enqueue([NATIVE]), lambda: Study(study.path), lambda: drain(study)):
        assert "gone" in refused(work)
        assert not study.path.exists()


def test_a_lock_is_no_link_to_a_file_of_others(tmp_path: Path) -> None:
    (tmp_path / "x.kernel-lock").symlink_to(tmp_path / "elsewhere")
    assert "cannot use" in refused(lambda: ProcessLock(tmp_path / "x").acquire())
    assert not (tmp_path / "elsewhere").exists()


def _work(path: str, pause: float) -> None:
    drain(Study(path), pause)


def test_two_processes_share_one_queue(tmp_path: Path) -> None:
    study = new(tmp_path / "shared")
    study.enqueue([NATIVE, *PLANS])
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_work, args=(str(study.path), 0.05)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    alone = new(tmp_path / "alone")
    alone.enqueue([NATIVE, *PLANS])
    drain(alone)
    assert Study(study.path).counts() == {"done": 7, "waiting": 0, "running": 0}
    assert facts(Study(study.path)) == facts(alone)


def _die(path: str) -> None:
    study = Study(path)
    study.ask()
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_was_running_is_queued_again(tmp_path: Path) -> None:
    study = new(tmp_path)
    study.enqueue([NATIVE, *PLANS])
    victim = multiprocessing.get_context("spawn").Process(target=_die, args=(str(tmp_path),))
    victim.start()
    victim.join(60)
    assert victim.exitcode == -signal.SIGKILL
    again = Study(tmp_path)
    assert again.counts() == {"done": 0, "waiting": 6, "running": 1}
    assert again.release_lost() == 1
    assert again.counts() == {"done": 0, "waiting": 7, "running": 0}
    mine = again.ask()
    assert mine is not None
    assert again.release_lost() == 0  # what a living process runs is left to it


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    study = new(tmp_path)
    study.enqueue([NATIVE])
    asked = study.ask()
    assert asked is not None
    (tmp_path / "examples").write_text("in the way")  # as good as a full disk: the file cannot be made
    with pytest.raises((UserError, OSError)):
        study.tell(asked, rows(asked.plan), {})
    assert study.counts()["done"] == 0


@pytest.mark.parametrize("storage", [None, "sqlite:///{}/team.db"])
def test_an_old_cache_of_the_queue_takes_no_plan_twice_and_loses_none(
    storage: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sensitivity.study.trial_cache.AGE_PER_READ", 1e9
    )  # neither ever reads the queue again of its own accord
    where = storage and storage.format(tmp_path)
    ours = Study.create(tmp_path, PARTS, ["vqa"], {"seed": 0}, where)
    ours.enqueue([NATIVE, *PLANS])
    theirs = Study(tmp_path)
    assert ours.counts() == theirs.counts()
    seen: list[tuple[str, int]] = []
    last: dict[Study, Any] = {ours: None, theirs: None}
    for study in [theirs, theirs, ours, ours, theirs, *[ours, theirs] * 40]:
        if (asked := study.ask(last[study])) is not None:
            seen.append((asked.plan.key, asked.done))
            study.tell(asked, rows(asked.plan, n=30 + asked.done), {}, 30 if asked.done == 0 else None)
            last[study] = asked
    assert sorted(seen) == sorted((plan.key, done) for plan in [NATIVE, *PLANS] for done in (0, 30))
    assert ours.counts() == {"done": 7, "waiting": 0, "running": 0}
    close(ours._storage)
    close(theirs._storage)


def test_the_cache_reads_again_when_reading_is_cheap_beside_the_time_since(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, readings = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def read() -> list[Any]:
        clock[0] += 2  # seconds
        readings.append(clock[0])
        return []

    cache = TrialCache(read)
    for _ in range(100):
        cache.cached()
        clock[0] += 1
    assert readings == [2, 44, 86]  # each is good for twenty times as long as it took
