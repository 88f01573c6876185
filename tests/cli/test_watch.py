"""sensitivity watch follows a sweep of another process to its end, and changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import planted
import pytest

from sensitivity.analysis.reporting import sentences
from sensitivity.cli.main import main
from sensitivity.cli.verbs.reading import watch
from sensitivity.study.study import Study

OTHER = """
    import sys, time
    from sensitivity.study.study import Study
    study = Study(sys.argv[1])
    print("ready", flush=True)
    while (trial := study.ask()) is not None:
        time.sleep(0.4)
        row = {"task": ["vqa"] * 4, "example": list("abcd"), "cluster": list("abcd"), "kind": ["k"] * 4,
               "score": [1.0, 0.0, 1.0, 0.0], "nll": [0.1] * 4, "answer": ["yes"] * 4}
        study.tell(trial, row, {"seconds": 0.4})
"""


def test_it_ends_with_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Study.create(tmp_path / "run", planted.parts(), ["vqa"], {"model": "planted"})
    made.enqueue([made.native, *(planted.plan(planted.PARTS, row) for row in planted.grid((2, 4))[:4])])
    code = textwrap.dedent(OTHER)
    with subprocess.Popen([sys.executable, "-c", code, str(made.path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        assert main(["watch", str(made.path), "--every", "1"]) == 0
        assert other.wait(30) == 0
    out, err = capsys.readouterr()
    assert "waiting" in err
    assert "5 plans done, 0 running, 0 waiting" in out
    assert "Frontier" in out


def test_it_ends_where_the_sweep_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Study.create(tmp_path / "run", planted.parts(), ["vqa"], {"model": "planted"})
    made.enqueue([made.native, *(planted.plan(planted.PARTS, row) for row in planted.grid((2, 4))[:2])])
    code = "import sys, time; from sensitivity.study.study import Study; study = Study(sys.argv[1]); study.ask()"
    code += "; print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(made.path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        assert main(["watch", str(made.path), "--once"]) == 0
        assert "0 plans done, 1 running, 2 waiting\n" in capsys.readouterr().out
        other.kill()
        other.wait(30)
    assert main(["watch", str(made.path), "--every", "1"]) == 0
    out = capsys.readouterr().out
    assert "0 plans done, 0 running, 2 waiting, 1 stopped as their process ended; no process is known to work" in out
    assert f"to go on, type the command that began it again, with --out {made.path}" in out
    assert made.counts()["running"] == 1, "it changes nothing"
    assert main(["watch", str(made.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["running"], found["waiting"], found["stopped"]) == (0, 2, 1)


def test_it_ends_where_the_sweep_was_killed_between_two_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing runs; but for a while, a process that will run the rest may be loading its model."""
    monkeypatch.setattr(watch, "LOADING", 2.5)
    made = Study.create(tmp_path / "run", planted.parts(), ["vqa"], {"model": "planted"})
    made.enqueue([made.native, *(planted.plan(planted.PARTS, row) for row in planted.grid((2, 4))[:2])])
    once = textwrap.dedent(OTHER).replace("while (trial := study.ask()) is not None", "for trial in [study.ask()]")
    code = once + "print('done', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(made.path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert [other.stdout.readline() for _ in range(2)] == ["ready\n", "done\n"]
        assert main(["watch", str(made.path), "--once"]) == 0
        assert "1 plans done, 0 running, 2 waiting\n" in capsys.readouterr().out
        other.kill()
        other.wait(30)
    began = time.monotonic()
    assert main(["watch", str(made.path), "--every", "1"]) == 0
    assert time.monotonic() - began > 2.5
    out = capsys.readouterr().out
    assert "1 plans done, 0 running, 2 waiting; no process is known to work on them; to go on, type " in out


def test_it_waits_for_a_study_that_is_not_there_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep makes its folder only once its model is loaded; a single look does not wait."""
    run = tmp_path / "run"

    def begin() -> None:
        time.sleep(0.3)
        planted.study(run, {"cider": planted.product}, levels=(4, 16))

    with ThreadPoolExecutor() as beside:
        begun = beside.submit(begin)
        assert main(["watch", str(run)]) == 0
        begun.result()
    out, err = capsys.readouterr()
    assert f"no study at {run} yet: waiting until one is begun" in err
    assert "8 plans done" in out
    assert main(["watch", str(tmp_path / "other"), "--once"]) == 2
    assert "makes one, and so does `plan`" in capsys.readouterr().err
    assert main(["watch", str(tmp_path)]) == 2, "no study can be begun among other files"


def test_one_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Study.create(tmp_path / "run", planted.parts(), ["vqa"], {"model": "planted"})
    made.enqueue([made.native])
    assert main(["watch", str(made.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["done"], found["waiting"], found["frontier"]) == (0, 1, [])
    assert main(["watch", str(made.path), "--once"]) == 0
    assert "0 plans done, 0 running, 1 waiting" in capsys.readouterr().out
    table = planted.study(tmp_path / "table", {"cider": planted.product}, levels=(4, 16))
    assert main(["watch", str(table.path)]) == 0
    assert "8 plans done" in capsys.readouterr().out


def test_the_report_counts_a_plan_of_a_killed_process_as_waiting(tmp_path: Path) -> None:
    made = Study.create(tmp_path / "run", planted.parts(), ["vqa"], {"model": "planted"})
    made.enqueue([made.native, *(planted.plan(planted.PARTS, row) for row in planted.grid((2, 4))[:2])])
    code = "import sys; from sensitivity.study.study import Study; Study(sys.argv[1]).ask()"
    subprocess.run([sys.executable, "-c", code, str(made.path)], check=True)
    told = sentences._change(made, [], [])
    assert told[0] == "3 plans of this sweep are still waiting to be measured."
    assert made.ask() is not None
    told = sentences._change(made, [], [])
    assert told[0] == "2 plans of this sweep are still waiting to be measured."
    assert told[1] == "1 plan of this sweep is being measured."
