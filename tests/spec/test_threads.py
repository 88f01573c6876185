"""Threads and progress: who waits sleeps, who shares takes its share, and who follows a log sees that it goes on."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np  # noqa: F401 - its library is one of those whose threads are counted
import pytest
import threadpoolctl

from sensitivity.cli.arguments import values
from sensitivity.cli.output import progress, ticker
from sensitivity.cli.processes import workers
from sensitivity.measure.loop import Step
from sensitivity.spec import stage, threads
from sensitivity.spec.plan import Plan


def test_waiting_threads_sleep_whoever_imports_it_and_what_the_user_set_stays() -> None:
    shown = "os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules"
    command = [sys.executable, "-c", f"import sensitivity, os, sys; print({shown})"]
    plain = {name: value for name, value in os.environ.items() if name not in threads.ASLEEP}
    for given, told in (({}, "PASSIVE 0 False"), ({"GOMP_SPINCOUNT": "7"}, "PASSIVE 7 False")):
        done = subprocess.run(command, env=plain | given, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == told


def test_linear_algebra_has_one_thread_while_it_is_asked_for() -> None:
    def counts() -> list[int]:
        return [one["num_threads"] for one in threadpoolctl.threadpool_info() if one["user_api"] == "blas"]

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = counts()
        with threads.one_for_linear_algebra():
            assert set(counts()) == {1}
        assert counts() == before


def test_a_container_has_the_cores_that_it_was_given(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for text, count in (("200000 100000", 2), ("50000 100000", 1), ("max 100000", 16), ("9900000 100000", 16)):
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
        assert threads.cores() == count
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "absent")
    assert threads.cores() == 16


def test_a_process_a_core_as_far_as_memory_plans_and_threads_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 8)
    monkeypatch.setattr(threads, "free_memory", lambda: int(20e9))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv(workers.CHILD, raising=False)
    small, large = SimpleNamespace(numel=3_000_000), SimpleNamespace(numel=2_000_000_000)

    def count(parts: Any, plans: int = 125, **given: Any) -> int:
        asked = {"workers": "auto", "device": "cpu", "plain": False} | given
        return workers.count(argparse.Namespace(**asked), parts, plans, 3)

    assert count(small) == 8
    assert count(small, plans=3) == 3
    assert count(large) == 1  # two would take 50 GB
    assert count(small, device="cuda") == count(small, plain=True) == 1
    assert count(large, workers=5) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert count(small) == 2
    monkeypatch.setenv(workers.CHILD, "1")
    assert count(small) == 1


@pytest.mark.parametrize(("left", "joins"), [(100, 1), (10, 0)])
def test_others_join_where_what_is_left_is_worth_it(left: int, joins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    ended = SimpleNamespace(wait=lambda: 0, poll=lambda: 0, stdin=None)
    monkeypatch.setattr(
        workers, "_start_worker", lambda args: started.append(args) or workers.Worker(ended, io.BytesIO())
    )
    step = Step(Plan(()), {}, 1.0, False, 1, left, 10, 1)
    args = argparse.Namespace(workers="auto")
    with workers.beside_workers(args, 2, iter([step, step, step])) as shared:
        assert not started
        assert len(list(shared)) == 3
    assert len(started) == joins


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "two", "99999999999", "nan"])
def test_a_number_of_processes_is_a_number(text: str) -> None:
    assert values.workers_or_auto("auto") == "auto"
    assert values.workers_or_auto("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match=r"takes a whole number from 1 to [\d,]+, not"):
        values.workers_or_auto(text)


def test_a_line_comes_while_a_step_lasts_and_only_the_inner_one_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    with ticker.Ticker(lambda: "outer", every=1.02), ticker.Ticker(lambda: "inner", every=1.02):
        capsys.readouterr()  # what the outer one told before the inner one had begun
        late = time.monotonic() + 30
        while told.count("inner") < 4 and time.monotonic() < late:
            time.sleep(0.02)
            told += capsys.readouterr().err.split()
    assert told.count("inner") >= 4
    assert told.count("outer") <= 1  # one that was being printed when the inner one began


def test_a_sweep_in_a_log_tells_its_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sensitivity.cli.output.progress import show_progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(ticker.Ticker, "__init__", _often(ticker.Ticker.__init__))

    def steps() -> Iterator[Step]:
        for done in (1, 2):
            time.sleep(0.1)
            yield Step(Plan(()), {"vqa": 0.5}, 100.0, False, done, 4 - done, 4, 1)
        time.sleep(0.1)

    assert show_progress(steps(), "sweeping") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sweeping: preparing, time left not known yet"
    assert any(line.startswith("sweeping: 25 %, vqa 0.500, 0:05:0") for line in lines)
    assert lines[-1] == "sweeping: 100 %, in 0:00:00"
    assert show_progress(iter(()), "sweeping") == 0
    assert capsys.readouterr().err.splitlines()[-1] == "sweeping: nothing was left to do"


def _often(usual: Any) -> Any:
    return lambda self, line, first=0.0, every=0.0: usual(self, line, first, 1.02)


def test_a_terminal_shows_what_runs_while_a_model_is_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress.show_stages():
        for _ in stage.each([1, 2], "calibrating", "examples", 2):
            time.sleep(0.5)  # the line is drawn four times a second
    assert "calibrating: 1 of 2 examples, 0:00:0" in terminal.getvalue()


def test_lines_off_a_terminal_say_what_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ticker, "FIRST", 0.05)
    with ticker.working("sweep"):
        for _ in stage.each([1], "quantizing", "blocks", 9):
            time.sleep(0.3)
    assert capsys.readouterr().err == "sweep: quantizing: 0 of 9 blocks; 0:00:00 so far\n"
