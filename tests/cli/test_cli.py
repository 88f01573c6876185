"""What a user types and reads: verbs, --json, one clear sentence per mistake, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import planted
import pytest
from forked import forked

from sensitivity.analysis.recommending import kept_recommendation
from sensitivity.analysis.reporting.figure_files import FigureFiles
from sensitivity.analysis.reporting.table_rows import frontier_rows
from sensitivity.api.attribution_file import save_attributions
from sensitivity.cli import main as cli
from sensitivity.cli.processes import workers
from sensitivity.formats.table import CHECKS
from sensitivity.spec.errors import NoSpace
from sensitivity.spec.plan import Plan
from sensitivity.spec.runtimes.table import files_of
from sensitivity.spec.sizes import size
from sensitivity.spec.version import __version__
from sensitivity.study.study import Study

pytestmark = pytest.mark.usefixtures("few_trees")
MODEL = "embedded:scenes-llava"
SWEEP = f"sweep {MODEL} --task vqa --bits 2,4,8 --by part --method uniform --n 15"


def run(capsys: pytest.CaptureFixture[str], line: str, *more: object) -> tuple[int, str, str]:
    status = cli.main([*line.split(), *map(str, more)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    assert cli.main([*SWEEP.split(), "--out", str(out)]) == 0
    return out


def one_object(printed: str) -> dict[str, Any]:
    found = json.loads(printed)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"example: sensitivity {verb}" in " ".join(printed.split())
    assert "--json" in printed


@pytest.mark.parametrize("verb", cli.VERBS)
def test_examples_can_be_parsed(verb: str) -> None:
    example = cli.VERBS[verb].EXAMPLE
    assert example.startswith("sensitivity ")
    assert cli.parser_of(cli.VERBS).parse_args(example.split()[1:]).verb == verb


def test_python_m_sensitivity_is_the_same() -> None:
    printed = [
        subprocess.run([sys.executable, *words, "--help"], capture_output=True, text=True, check=True).stdout
        for words in (
            ["-m", "sensitivity"],
            ["-c", "import sys; from sensitivity.cli.main import main; sys.exit(main())"],
        )
    ]
    assert printed[0] == printed[1]
    assert printed[0].startswith("usage: sensitivity")


def test_inspect_says_what_is_where(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, f"inspect {MODEL} --by part")
    assert status == 0
    for words in ("vision", "connector", "language", "Kept at native precision", "patch convolution", "Uniform plans"):
        assert words in out


def test_inspect_needs_nothing_but_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sensitivity.models.loading import load

    load(MODEL).model.config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    status, out, _ = run(capsys, "inspect", tmp_path, "--config-only", "--json")
    _, whole, _ = run(capsys, f"inspect {MODEL} --json")
    assert status == 0
    assert one_object(out)["components"] == one_object(whole)["components"]


def test_sweep_rank_recommend_report_export(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, SWEEP, "--out", study)
    assert status == 0
    assert "nothing was left to do" in err
    assert "28 plans in" in out
    status, out, _ = run(capsys, "rank", study, "--bootstraps", "10")
    assert status == 0
    assert "Importance for vqa" in out
    assert re.search(r"forest on plans that it has not seen -?\d\.\d\d, of a linear model on those that it has", out)
    status, out, _ = run(capsys, "recommend", study, "--bpw", "5")
    assert status == 0
    assert "Best plan for 5 bits per weight" in out
    assert "measured on examples that had no part in the choice" in out
    plan = json.loads((study / "plan.json").read_text())
    assert plan["size"]["bpw"] <= 5
    assert plan["provenance"]["verified"]["fingerprint"] == Study(study).meta["fingerprint"]
    card = (study / "plan.md").read_text()
    measured = ("| vqa | ", "right → wrong", "* benchmark: vqa, at most 15 examples drawn with seed", "* versions: ")
    for said in (
        "| vision | ",
        "* method: uniform, without calibration",
        f"{plan['size']['bytes']:,} bytes",
        *measured,
    ):
        assert said in card, said
    assert str(study) not in card
    status, out, _ = run(capsys, "report", study)
    assert status == 0
    assert (study / "report" / "index.html").stat().st_size > 10_000
    status, _, _ = run(capsys, "export", study / "plan.json", "--out", tmp_path / "copy.json")
    assert status == 0
    assert json.loads((tmp_path / "copy.json").read_text())["plan"] == plan["plan"]


def test_sizes_are_those_of_the_runtimes_files_in_every_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO stores codes of 3 bits in 4; a study that is swept for another runtime counts as that one does."""
    monkeypatch.delitem(CHECKS, "openvino")  # nothing is run there
    monkeypatch.delitem(CHECKS, "onnx")
    out = tmp_path / "run"
    grid = f"sweep {MODEL} --task vqa --bits 3,8 --by part --method rtn --n 6 --out {out} --runtime"
    printed = run(capsys, f"{grid} openvino")[1]
    study = Study(out)
    sizes = {trial.key: trial.bpw for trial in study.measured()}
    for trial in study.measured():
        assert trial.bpw == size(study.parts, trial.plan, "openvino").bpw
        assert trial.values[-1] == trial.bpw  # what searches minimize
    (scheme,) = {one for trial in study.measured() for one in trial.plan.distinct_schemes if one.bits == 3}
    three = Plan.uniform(study.parts, scheme)
    assert sizes[three.key] > size(study.parts, three).bpw + 0.7
    frontier = frontier_rows(study.table(), "vqa").set_index("key")["bpw"]
    assert "no smaller plan as openvino stores it" in printed
    for bpw in frontier:
        assert re.search(rf"^ *{bpw:.2f} ", printed, re.MULTILINE)
    # 4 bits and their scales do not fit where 3 would
    assert run(capsys, f"recommend {out} --bpw 3.9 --runtime openvino --no-run")[0] == 2
    assert run(capsys, f"recommend {out} --bpw 7 --runtime openvino --no-run")[0] == 0
    (plan,) = kept_recommendation.recommended(study)
    assert plan.size.bpw == study.size(plan.plan).bpw <= 7
    assert run(capsys, f"report {out}")[0] == 0
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert "Sizes are those in openvino files" in page
    for key, bpw in frontier.items():
        assert re.search(rf"<tr><td>{bpw:.2f}</td>.*<td>{str(key)[:8]}</td>", page)
    for other in ("onnx", "plan"):
        points = json.loads(run(capsys, f"{grid} {other} --json")[1])["frontier"]
        plans = {trial.key: trial.plan for trial in study.measured()}
        wanted = {key: size(study.parts, plan, files_of(other)).bpw for key, plan in plans.items()}
        assert [point["bpw"] for point in points] == [round(wanted[point["key"]], 4) for point in points]


def test_a_list_of_budgets_is_run_once(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "recommend STUDY --bpw 5,7 --allow vision=4,8,16 --top 1"
    status, out, _ = run(capsys, line.replace("STUDY", str(study)))
    assert status == 0
    assert "Best plan for 5 bits per weight" in out
    assert "Best plan for 7 bits per weight" in out
    measured = len(Study(study / "verify").trials())
    status, _, err = run(capsys, line.replace("STUDY", str(study)))
    assert status == 0
    assert "nothing was left to do" in err
    assert len(Study(study / "verify").trials()) == measured
    assert "allows nothing" not in err
    status, _, err = run(capsys, f"recommend {study} --bpw 5 --no-run --allow vision=4,5")
    assert "--allow vision=4,5: 5 allows nothing, since the widths that were measured are " in err
    _, out, _ = run(capsys, f"recommend {study} --gb 0.0025 --no-run")
    assert re.search(r"--gb: 0.0025 GB is (\S+) bits per weight\n\nBest plan for \1 bits per weight", out)
    run(capsys, line.replace("STUDY", str(study)))
    for name in ("plan.json", "plan-7bpw.json"):
        found = json.loads((study / name).read_text())
        assert found["plan"]["vision"] is None or found["plan"]["vision"]["bits"] in (4, 8)
        assert found["measured"]["n"] == 15
        assert found["provenance"]["asked"]["bpw"] == [5, 7]


def test_a_budget_that_cannot_be_met_leaves_the_others_answered(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(study, mine)
    for name in ("plan.json", "plan.md"):
        (mine / name).unlink(missing_ok=True)
    status, out, err = run(capsys, f"recommend {mine} --bpw 1,5,7 --no-run")
    assert status == 2
    assert [f"Best plan for {bpw} bits per weight" in out for bpw in (1, 5, 7)] == [False, True, True]
    assert "error: no plan fits 1.00 bpw" in err
    assert json.loads((mine / "plan.json").read_text())["size"]["bpw"] <= 5
    assert (mine / "plan-7bpw.json").exists()
    status, out, err = run(capsys, f"recommend {mine} --bpw 5,1 --no-run --json")
    found = one_object(out)
    assert [one["budget_bpw"] for one in found["budgets"]] == [5]
    assert {"error": found["error"], "exit": found["exit"]} == json.loads(err.splitlines()[-1])
    assert status == found["exit"] == 2
    assert run(capsys, f"recommend {mine} --bpw 1,1.5 --no-run")[0] == 2


def test_a_plan_for_another_budget_or_without_a_run_replaces_no_verified_plan(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each budget has one file, whose name says it; plan.json is the last call's first budget."""
    mine = tmp_path / "mine"
    shutil.copytree(study, mine, ignore=shutil.ignore_patterns("plan*", "verify"))

    def saved(name: str = "plan.json") -> tuple[float, str, bool]:
        found = json.loads((mine / name).read_text())
        assert found["describe"] in (mine / name).with_suffix(".md").read_text()
        return found["budget_bpw"], found["key"], found["measured"] is not None

    assert run(capsys, f"recommend {mine} --bpw 5 --top 1")[0] == 0
    at_five = saved()
    assert at_five[::2] == (5, True)
    _, _, err = run(capsys, f"recommend {mine} --bpw 7 --no-run")
    assert f"plan.json was the plan for 5 bpw, which is kept as {mine / 'plan-5bpw.json'}: plan.json is for 7 " in err
    assert saved()[::2] == (7, False)
    assert saved("plan-5bpw.json") == at_five
    _, out, err = run(capsys, f"recommend {mine} --bpw 5 --no-run")
    assert f"{mine / 'plan.json'} holds this plan for 5 bpw with its verification, which is kept" in err
    assert "measured on examples that had no part" in out
    assert saved() == at_five
    assert not (mine / "plan-5bpw.json").exists()
    assert saved("plan-7bpw.json")[::2] == (7, False)
    # another plan is predicted to be best now
    changed = json.loads((mine / "plan.json").read_text())
    other = Plan.from_json({name: None if name == "vision" else one for name, one in changed["plan"].items()})
    (mine / "plan.json").write_text(json.dumps({**changed, "plan": other.to_json(), "key": other.key}))
    status, out, err = run(capsys, f"recommend {mine} --bpw 5 --no-run --json")
    (note,) = (json.loads(line)["note"] for line in err.splitlines())
    assert f"plan.json keeps the plan for 5 bpw that was verified ({other.describe()}); the one that is " in note
    assert (status, one_object(out)["key"], one_object(out)["path"]) == (0, at_five[1], None)
    assert saved() == (5, other.key, True)
    # with another request, it is what was asked for, and a note says what it was
    status, _, err = run(capsys, f"recommend {mine} --bpw 5 --no-run --floor vqa=0.1")
    assert status == 0
    was = "plan.json held a plan that was verified for --task vqa, and holds one that is only predicted now"
    assert f"{was}; without --no-run it is verified" in err
    assert saved()[::2] == (5, False)


@pytest.mark.slow
def test_the_demo_and_the_demo_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole line on few examples; the second time no plan is run."""
    status, out, err = run(capsys, "demo --n 30 --bpw 5", "--out", tmp_path / "demo")
    assert status == 0
    assert "100 %" in err
    for words in ("Kept at native precision", "Importance for vqa", "Best plan for 5 bits per weight", "report: "):
        assert words in out
    assert (tmp_path / "demo" / "plan.json").exists()
    assert out.index("$ sensitivity plan") < out.index("$ sensitivity sweep")
    page = (tmp_path / "demo" / "report" / "index.html").read_text()
    assert "data-plan" in page or "<svg" in page
    status, again, err = run(capsys, "demo --n 30 --bpw 5", "--out", tmp_path / "demo")
    assert status == 0
    assert err.count("nothing was left to do") == 4
    assert timeless(again) == timeless(out)


def timeless(out: str) -> list[str]:
    """What was printed, without the line that says how long scores took."""
    return [line for line in out.splitlines() if not line.startswith("Scored on calibration data")]


@pytest.mark.parametrize(
    "line", [f"inspect {MODEL}", "rank STUDY --bootstraps 10", "recommend STUDY --bpw 5 --no-run", "report STUDY"]
)
def test_json_is_one_object_and_nothing_else(study: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, line.replace("STUDY", str(study)), "--json")
    assert status == 0
    one_object(out)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("inspect nowhere/at/all", "nowhere/at/all"),
        ("inspect embedded:scenes", "did you mean"),
        (f"inspect {MODEL} --method gtpq", "unknown method 'gtpq'; choose from"),
        (f"inspect {MODEL} --method uniform --bits 9", "uniform takes 1 to 8 bits, not 9"),
        (f"inspect {MODEL} --method uniform --group 32", "uniform is always per tensor"),
        (f"inspect {MODEL} --by parts", "did you mean part?"),
        (f"sweep {MODEL} --task vaq --out OUT", "unknown task 'vaq'; choose from"),
        (f"sweep {MODEL} --task gone.jsonl --out OUT", "cannot read gone.jsonl"),
        (f"sweep {MODEL} --search gird --out OUT", "unknown search 'gird'; choose from grid"),
        (f"sweep {MODEL} --device warp --out OUT", "unknown device 'warp'; choose from cpu"),
        (f"sweep {MODEL} --dtype int3 --out OUT", "unknown dtype 'int3'"),
        (f"sweep {MODEL} --by linear --out OUT", "choose coarser parts"),
        (f"sweep {MODEL} --n 0 --out OUT", "takes a whole number from 1 to 1,000,000, not '0'"),
        ("rank OUT", "no study at"),
        (f"sweep {MODEL} --out OUT --until soon", "is none of: complete"),
        ("recommend STUDY --bpw 1.0", "can be reached; ask for more"),
        ("recommend STUDY --task capton", "capton"),
        ("recommend STUDY --no-run --runtime comprsed", "did you mean compressed-tensors?"),
        (
            "recommend STUDY --no-run --bpw 5 --runtime compressed-tensors",
            "compressed-tensors can load no plan that this study measured; `sensitivity sweep ",
        ),
        ("export STUDY --out OUT", "name a budget"),
        ("export STUDY --bpw 5 --format gguff --out OUT", "unknown format 'gguff'; choose from"),
    ],
)
def test_a_mistake_is_one_sentence(
    study: Path, tmp_path: Path, line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line.replace("STUDY", str(study)).replace("OUT", str(tmp_path / "out"))
    status, out, err = run(capsys, words)
    assert status == 2
    assert out == ""
    lines = [text for text in err.splitlines() if text.startswith("error: ")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "journal.log").exists()
    status, out, _ = run(capsys, words, "--json")
    assert (status, sentence in one_object(out)["error"]) == (2, True)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    words = ["rank", str(tmp_path / "gone"), "--debug"]
    assert "Traceback" in forked(f"from sensitivity.cli.main import main; main({words!r})")


def test_a_corrupt_picture_stops_the_sweep_before_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "own.jsonl").write_text(json.dumps({"image": "a.png", "prompt": "what?", "answers": ["this"]}))
    status, _, err = run(capsys, f"sweep {MODEL} --task {tmp_path}/own.jsonl --bits 4", "--out", tmp_path / "out")
    assert status == 2
    assert "an image that cannot be read" in err
    assert "a.png" in err


@pytest.mark.slow
def test_a_full_disk_is_a_sentence_and_the_sweep_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that fills up in the middle of the journal."""
    command = [sys.executable, "-m", "sensitivity", *SWEEP.split(), "--out", str(tmp_path / "out")]

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    full = subprocess.run(command, capture_output=True, text=True, preexec_fn=small, check=False)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("error: ")
    assert "no space is left for" in full.stderr
    assert "Traceback" not in full.stderr
    assert not list((tmp_path / "out").rglob(".*"))
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert one_object(again.stdout)["done"] == 28
    assert Study(tmp_path / "out").counts() == {"done": 28, "waiting": 0, "running": 0}


def test_workers_share_the_queue_and_one_that_dies_loses_nothing(study: Path, tmp_path: Path) -> None:
    """The first process is held until the second has begun a trial, in which it is killed: one table all the same."""
    out, some = tmp_path / "crew", SWEEP.replace("2,4,8", "2,8")  # 9 of the 28 plans
    command = [sys.executable, "-m", "sensitivity", *some.split(), "--out", str(out), "--workers", "2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        children: list[str] = []
        while not children and process.poll() is None:
            time.sleep(0.01)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        worker, begun = int(children[0]), False
        deadline = time.monotonic() + 120
        while not begun and time.monotonic() < deadline:
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(0.2)
            begun = worker in {line.get("user_attr", {}).get("owner", {}).get("pid") for line in journal(out)}
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.005)  # it may have been stopped with a lock in its hand
        os.kill(worker, signal.SIGKILL)
        printed, told = process.communicate()
    assert begun
    assert '{"note": "1 of the workers ended early (signal 9); what they were running is run again"}' in told
    assert process.returncode == 0
    assert one_object(printed)["done"] == 9
    ours, theirs = (Study(path).table().set_index("key").sort_index() for path in (out, study))
    assert Study(out).counts() == {"done": 9, "waiting": 0, "running": 0}
    assert ours.index.is_unique
    assert (ours["vqa"] == theirs.loc[ours.index, "vqa"]).all()


def journal(out: Path) -> list[dict[str, Any]]:
    path = out / "journal.log"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def test_a_database_serves_as_well_as_a_journal(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, some = tmp_path / "team", SWEEP.replace("2,4,8", "2,8")  # 9 of the 28 plans
    status, _, _ = run(capsys, some, "--out", out, "--storage", f"sqlite:///{tmp_path}/team.db", "--json")
    assert status == 0
    assert not (out / "journal.log").exists()
    ours, theirs = (Study(path).table().set_index("key").sort_index() for path in (out, study))
    assert len(ours) == 9
    assert (ours["vqa"] == theirs.loc[ours.index, "vqa"]).all()
    status, _, err = run(capsys, some, "--out", out)  # the folder remembers where its study is
    assert status == 0
    assert "nothing was left to do" in err


def test_a_database_that_is_not_there_is_named_without_its_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/no/such/folder/a.db"
    status, _, err = run(capsys, SWEEP, "--out", tmp_path / "x", "--storage", url)
    assert status == 2
    assert "cannot open the storage sqlite" in err
    assert not (tmp_path / "x").exists()
    from sensitivity.study.storage.opening import without_password

    assert without_password("postgresql://me:secret@host/db") == "postgresql://me@host/db"


def test_what_compiled_code_prints_never_stands_beside_json() -> None:
    """The solver prints of a second solve with a bare printf; here every solve does."""
    code = """
import ctypes, json, os, sys
from sensitivity.cli import main as cli
from sensitivity.cli.verbs import rank
def run(args):
    print("python")
    ctypes.CDLL(None).printf(b"compiled, in a buffer\\n")
    os.write(1, b"unbuffered\\n")
    return {"score": float("nan")}
rank.run = run
sys.exit(cli.main(["rank", "somewhere", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"score": None}
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"note": line} in said for line in ("python", "compiled, in a buffer", "unbuffered"))


def test_the_solver_is_silent_where_a_person_reads() -> None:
    code = """
import ctypes
from sensitivity.spec.standard_output import silenced
print("before")
with silenced():
    ctypes.CDLL(None).printf(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\\n")
print("after")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["before", "after"]


def test_a_parsers_error_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, f"sweep {MODEL} --json --nonsense 1 --out runs/x")
    assert status == 2
    assert "unrecognized words: --nonsense 1" in one_object(out)["error"]
    assert out == err
    assert one_object(run(capsys, f"{SWEEP} --json --debug --bits 9")[2])["traceback"].startswith("Traceback")


def test_a_worker_that_swallows_the_interrupt_ends_with_its_launcher() -> None:
    """As where the launcher is killed while a worker imports a library that catches everything."""
    swallows = (
        "import time; from sensitivity.cli.processes import workers; workers.SECONDS_TO_STOP = 0.5; word = 'up'\n"
        "workers.stop_with_launcher()\n"
        "while True:\n    try:\n        print(word, flush=True)\n        while True: time.sleep(0.05)\n"
        "    except: word = 'swallowed'"
    )
    env = {**os.environ, workers.CHILD: workers.STOPS_WITH_LAUNCHER}
    pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", swallows], env=env, text=True, **pipe) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "up\n"
        told, _ = worker.communicate(timeout=60)  # closes its standard input, as the kernel does for a killed launcher
    assert (told, worker.returncode) == ("swallowed\n", 130)


@pytest.mark.slow
def test_workers_that_are_done_end_in_silence(tmp_path: Path) -> None:
    """The one that started them is still there then, and nothing of theirs may break at their exit."""
    words = f"sweep {MODEL} --task vqa --bits 2,8 --method uniform --n 12 --workers 2 --out {tmp_path / 'out'}"
    done = subprocess.run([sys.executable, "-m", "sensitivity", *words.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ended early" not in done.stderr


def test_no_memory_for_a_library_is_no_defect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(args: object) -> None:
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    monkeypatch.setattr("sensitivity.cli.verbs.rank.run", no_room)
    assert cli.main(["rank", "somewhere"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory while a library was loaded: libtorch_cpu.so")
    assert "defect" not in said


def test_methods_are_listed_with_what_they_store(capsys: pytest.CaptureFixture[str]) -> None:
    from sensitivity.quantize.methods import METHODS
    from sensitivity.quantize.presets import PRESETS
    from sensitivity.quantize.sources import SOURCES

    assert set(SOURCES) == {*METHODS, *PRESETS}
    found = one_object(run(capsys, "methods --json")[1])["methods"]
    assert [method["name"] for method in found] == [*METHODS, *PRESETS]
    assert {method["name"] for method in found if method["gradients"]} == {
        *("mbq", "tlq", "tlq-gptq", "oac", "salq-vlm", "gwq", "squeezellm-fisher"),
    }
    assert {method["name"] for method in found if method["both_paths"]} == {"vlm-ptq", "gptaq", "salq-vlm"}
    assert {method["name"]: method["activations"] for method in found if method["activations"] < 16} == {
        **dict.fromkeys(("repq-vit", "ptq4sam", "quantvggt", "qvlm", "qvlm-released"), 4), "quantvla": 8,
    }  # fmt: skip
    assert all(method["calibrated"] for method in found if method["activations"] < 16)
    for method in found:
        # a code of b bits takes b bits; everything else comes on top. At half the rank, three square matrices have two
        # thirds of their codes.
        codes = 2 / 3 if method["name"] == "qsvd" else 1
        assert all(codes * int(bits) < stored for bits, stored in method["stored"].items()), method["name"]
    printed = run(capsys, "methods")[1]
    assert "bivlm" in printed
    assert "text read in full" in printed


def test_a_task_on_which_full_precision_scores_nothing_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "sweep embedded:scenes-blip2 --task ground --n 2 --bits 8 --search one-at-a-time --out"
    for more, note in (("first", "note: full"), ("second --json", '{"note": "full')):
        assert cli.main([*line.split(), *f"{tmp_path}/{more}".split()]) == 0
        assert f"{note} precision scores nothing on ground" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"sensitivity {__version__}\n"


def test_each_line_on_standard_error_is_an_object_beside_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a library prints in pieces, a line that looks like an object, progress, and that the verb was stopped."""

    def stopped(args: object) -> None:
        for text in ("loading", " 1 of 2\n\n", '{"half": 1\n', '{"done": 1}\n', "note: slow\n", "no end"):
            sys.stderr.write(text)
        raise KeyboardInterrupt

    monkeypatch.setattr("sensitivity.cli.verbs.sweep.run", stopped)
    status, out, err = run(capsys, f"{SWEEP} --out nowhere --json")
    told = {"error": "stopped before any plan was run; the same command begins again", "exit": status}
    notes = [{"note": text} for text in ("loading 1 of 2", '{"half": 1', "slow", "no end")]
    assert [json.loads(line) for line in err.splitlines()] == [*notes[:2], {"done": 1}, *notes[2:], told]
    assert (status, json.loads(out)) == (130, told)


def test_what_is_kept_is_said_only_where_something_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sensitivity.cli.verbs.plan.run", stopped)
    line = f"plan embedded:scenes-llava --bpw 3 --out {tmp_path / 'run'}"
    assert run(capsys, line)[::2] == (130, "stopped before any plan was run; the same command begins again\n")
    Study.create(tmp_path / "run", planted.parts(), ["vqa"], {"model": "planted"})
    assert run(capsys, line)[::2] == (130, "stopped; what was finished is kept, and the same command continues\n")


@pytest.mark.parametrize(
    "verb", ["plan MODEL --bpw 3", "sweep MODEL", "explain MODEL", "export run --format fake", "recommend run"]
)
def test_a_full_disk_keeps_only_what_there_is(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(args: object) -> None:
        raise NoSpace("no space is left for run/file; free some space")

    name = verb.split()[0]
    monkeypatch.setattr(f"sensitivity.cli.verbs.{name}.run", full)
    line = verb.replace("MODEL", MODEL) + ("" if name == "recommend" else f" --out {tmp_path / 'run'}")
    told = "error: no space is left for run/file; free some space, and the same command"
    continues = f"{told} continues: what was finished is kept\n"
    assert run(capsys, line)[::2] == (1, continues if name == "recommend" else f"{told} begins again\n")
    Study.create(tmp_path / "run", planted.parts(), ["vqa"], {"model": "planted"})
    kept = name in ("plan", "sweep", "recommend")
    assert run(capsys, line)[::2] == (1, continues if kept else f"{told} begins again\n")


def test_a_report_and_scores_on_a_full_disk_name_where_they_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leave no empty folder."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_text", "write_bytes"):
        monkeypatch.setattr(Path, name, full)
    with pytest.raises(NoSpace, match=f"no space is left for {tmp_path / 'report'}; free some space"):
        FigureFiles(tmp_path / "report").write(b"page")
    with pytest.raises(
        NoSpace, match=f"no space is left for {tmp_path / 'new' / 'why' / 'attributions.json'}; free some"
    ):
        save_attributions(tmp_path / "new" / "why", {})
    assert not list(tmp_path.iterdir())
