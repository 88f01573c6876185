"""sensitivity watch follows a sweep of another process to its end, and changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import planted
import pytest

from sensitivity.cli.main import main
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
    assert "0 plans done, 0 running, 2 waiting, 1 stopped as their process ended: the same sweep again" in out
    assert made.counts()["running"] == 1, "it changes nothing"
    assert main(["watch", str(made.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["running"], found["waiting"], found["stopped"]) == (0, 2, 1)


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
