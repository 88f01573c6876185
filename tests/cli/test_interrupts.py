"""Ctrl-C or SIGTERM at any moment: the verb ends with 130 or 143 and one word, also where a library swallows it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sensitivity.cli.processes import workers

FINALIZER = """
class Thing:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        len("the interrupt comes here, where nothing can be raised")
Thing()
time.sleep(30)
"""
IMPORT = "import swallows; time.sleep(30)"
SWALLOWS = "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\n    len('')\nexcept:\n    pass\n"
BREAKS = SWALLOWS.replace("pass", "raise AttributeError('half an import')")
PUTS_AWAY = """
import signal, time
try:
    signal.raise_signal(signal.SIGINT)
    time.sleep(30)
finally:
    time.sleep(1.5)
    print("put away")
"""


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """What a shell runs in the background ignores Ctrl-C, and a process passes that on: here none does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize(
    ("code", "said"),
    [(FINALIZER, ""), (IMPORT, ""), ("import breaks", ""), ("import puts_away", "put away\n")],
    ids=["finalizer", "import", "broken import", "cleanup"],
)
def test_an_interrupt_that_a_library_swallows_comes_again(
    tmp_path: Path, code: str, said: str, more: tuple[str, ...]
) -> None:
    for name, content in (("swallows", SWALLOWS), ("breaks", BREAKS), ("puts_away", PUTS_AWAY)):
        (tmp_path / f"{name}.py").write_text(content)
    verb = "import signal, time\n" + code
    start = (
        f"import sys\nfrom sensitivity.cli.verbs import rank\nsys.path.append({str(tmp_path)!r})\n"
        f"rank.run = lambda args: exec({verb!r}, {{}})\n"
        "import sensitivity.__main__ as ours\nsys.exit(ours.run())"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", start, "rank", "x", *more], capture_output=True, text=True)
    assert time.monotonic() - began < 25
    assert done.returncode == 130
    stopped = '{"error": "stopped", "exit": 130}\n' if more else "stopped\n"
    put_away = '{"note": "put away"}\n' if more and said else ""
    assert done.stderr == put_away + stopped
    assert done.stdout == (stopped if more else said)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "code", ["signal.raise_signal(NUMBER)\nlen('')", "exec('signal.raise_signal(NUMBER); len(str())')"]
)
def test_each_signal_has_its_exit_code(tmp_path: Path, number: signal.Signals, status: int, code: str) -> None:
    """Where it came through code in a string, too, after which `python -m` would die of SIGINT."""
    (tmp_path / "ours.py").write_text(
        "import signal, sys\nfrom sensitivity.cli.verbs import recommend\nfrom sensitivity.__main__ import run\n"
        f"def stopped(args):\n    {code.replace('NUMBER', str(int(number)))!r}\n"
        "recommend.run = lambda args: exec(stopped.__doc__)\nsys.exit(run())"
    )
    place = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    line = [sys.executable, "-m", "ours", "recommend", "x", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, env=place)
    told = "stopped; what was finished is kept, and the same command continues"
    assert (done.returncode, json.loads(done.stderr)) == (status, {"error": told, "exit": status})


def test_sigterm_ends_a_worker_at_once() -> None:
    """Its launcher waits for that, and then gives the worker's plan back."""
    code = (
        "import signal, sys\nfrom sensitivity.cli.verbs import methods\n"
        "methods.run = lambda args: signal.raise_signal(signal.SIGTERM)\n"
        "from sensitivity.__main__ import run\nsys.exit(run())"
    )
    line, place = [sys.executable, "-c", code, "methods"], {**os.environ, workers.CHILD: "ray"}
    assert subprocess.run(line, check=False, env=place).returncode == -signal.SIGTERM


def test_a_process_that_ignores_it_is_not_stopped() -> None:
    """As a shell starts what runs in the background, and nohup."""
    code = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom sensitivity.cli.verbs import methods\n"
        "methods.run = lambda args: signal.raise_signal(signal.SIGINT) or {}\n"
        "from sensitivity.__main__ import run\nsys.exit(run())"
    )
    assert subprocess.run([sys.executable, "-c", code, "methods"], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 1, 2, 3, 4, 5, 6])
def test_an_export_that_is_stopped_early_leaves_nothing(tmp_path: Path, seconds: float) -> None:
    study = tmp_path / "study"
    sweep = f"sweep embedded:scenes-llava --task vqa --bits 8 --search one-at-a-time --n 4 --out {study}".split()
    command = [sys.executable, "-m", "sensitivity"]
    subprocess.run([*command, *sweep], check=True, capture_output=True)
    before = {path for path in tmp_path.rglob("*") if path.name != "exports"}
    export = [*command, *f"export {study} --bpw 9 --format fake --out {tmp_path}/out/export".split()]
    with subprocess.Popen(export, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert "Traceback" not in told
    assert "ignored" not in told
    if process.returncode:
        assert process.returncode == 130
        assert told.splitlines()[-1] == "stopped"
        assert {path for path in tmp_path.rglob("*") if path.name != "exports"} == before
    else:
        assert (tmp_path / "out" / "export" / "card.json").exists()
