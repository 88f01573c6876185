"""A function in a process of its own: how it ends is told, and it never outlives the process that called it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import called
import pytest

from sensitivity.formats.writing import own_process

ENDED_WITHIN = 30.0  # seconds, on a busy machine; an idle one takes a few milliseconds


@pytest.fixture(autouse=True)
def _found_by_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of `called` can be imported there."""
    place = str(Path(called.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([place, *filter(None, [os.environ.get("PYTHONPATH")])]))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(process: int) -> None:
    deadline = time.monotonic() + ENDED_WITHIN
    while is_alive(process):
        assert time.monotonic() < deadline, f"process {process} outlives its caller"
        time.sleep(0.02)


def test_a_function_is_called_with_values(tmp_path: Path) -> None:
    assert own_process.call(called.write, file=str(tmp_path / "a"), text='"ä"\n') == own_process.Ended(0, "")
    assert (tmp_path / "a").read_text() == '"ä"\n'


def test_an_error_is_no_crash_and_an_error_of_ours_is_its_sentence() -> None:
    ended = own_process.call(called.refuse, noise=200_000)
    assert (ended.status, ended.crashed) == (own_process.FAILED, False)
    assert ended.last_line == "no space is left; free some"
    ended = own_process.call(called.crash, number="nine")
    assert not ended.crashed
    assert ended.last_line.startswith("TypeError: ")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_is_told_from_an_error(number: signal.Signals) -> None:
    ended = own_process.call(called.crash, number=int(number))
    assert (ended.status, ended.crashed) == (-number, True)


def test_a_process_that_crashes_before_it_reads_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_process, "PROGRAM", "import os; os.abort()")
    much = "a" * 1_000_000  # more than a pipe holds, so that writing it fails
    assert own_process.call(called.write, file="", text=much).crashed


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_a_caller_that_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    code = f"import called as c; from {own_process.__name__} import call; call(c.stay, file={str(begun)!r})"
    with subprocess.Popen([sys.executable, "-c", code]) as caller:
        while not (begun.exists() and begun.read_text()):
            assert caller.poll() is None
            time.sleep(0.02)
        process = int(begun.read_text())
        assert is_alive(process)
        caller.send_signal(number)
    wait_until_gone(process)


def test_it_ends_with_a_call_that_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = tmp_path / "begun"
    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if not begun.exists():
            while not (begun.exists() and begun.read_text()):
                time.sleep(0.02)
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own_process.call(called.stay, file=str(begun))
    assert not is_alive(int(begun.read_text()))
