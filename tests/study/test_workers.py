"""Many workers on one study: a real PostgreSQL that goes away, a Ray cluster that loses an actor, launchers killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pandas as pd
import planted
import pytest

from experiments.small.postgres import Postgres, initdb
from sensitivity.spec.errors import UserError
from sensitivity.study.storage.opening import close, open_storage
from sensitivity.study.study import Study

SWEEP = "sweep embedded:scenes-llava --bits 2,8 --method uniform --n 40 --json"
started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """A test that fails half-way leaves a launcher, whose pipes would be the next test's warnings."""
    yield
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
    started.clear()


def start(out: Path, *words: str, sweep: str = SWEEP) -> subprocess.Popen[str]:
    if "--bits" in words:  # instead of the usual ones: no flag may be there twice
        sweep = sweep.replace("--bits 2,8 ", "")
    command = [sys.executable, "-m", "sensitivity", *sweep.split(), "--out", str(out), *words]
    started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return started[-1]


def finished(process: subprocess.Popen[str]) -> dict[str, object]:
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(said)  # type: ignore[no-any-return]


def eventually(happened: Callable[[], bool], seconds: float = 600) -> None:
    began = time.monotonic()  # beside other busy processes Ray alone takes minutes to start
    while not happened():
        assert time.monotonic() - began < seconds, "it never happened"
        time.sleep(0.05)


def lives(pid: int) -> bool:
    """Whether a process is there, and not only waiting for somebody to ask how it ended."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def answers(out: Path) -> int:
    return len(list(out.glob("examples/[!.]*.parquet")))


def latest(out: Path) -> int:
    return max(path.stat().st_mtime_ns for path in out.glob("examples/[!.]*.parquet"))


def table(study: Study) -> pd.DataFrame:
    found = study.table()
    assert not found["key"].duplicated().any()
    return found.drop(columns=["number", "seconds"]).set_index("key").sort_index()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Study:
    out = tmp_path_factory.mktemp("alone") / "study"
    finished(start(out))
    return Study(out)


@pytest.mark.slow
def test_workers_stop_when_their_launcher_was_killed(tmp_path: Path) -> None:
    out = tmp_path / "study"
    launcher = start(out, "--workers", "2", sweep=SWEEP.replace("--n 40", "--n 1000"))
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    eventually(lambda: bool(children.read_text()))
    worker = int(children.read_text().split()[0])
    eventually(lambda: answers(out) >= 1)
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    eventually(lambda: not lives(worker), 60)
    study = Study(out)
    study.release_lost()
    assert study.counts()["waiting"] > 0
    assert study.counts()["running"] == 0


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    if initdb() is None:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra postgres)")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        server = Postgres(Path(folder))
        server.start()
        yield server
        server.stop()


def test_a_server_that_does_not_say_how_it_keeps_texts(postgres: Postgres, tmp_path: Path) -> None:
    """Such a one (SQL_ASCII) gives texts back as bytes, over which its driver stumbled."""
    words = "CREATE DATABASE plain ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    server = ["-h", "127.0.0.1", "-p", str(postgres.port), "-U", "team", "-d", "postgres"]
    subprocess.run(["psql", *server, "-c", words], check=True, stdout=subprocess.DEVNULL)
    url = postgres.url.removesuffix("postgres") + "plain"
    study = Study.create(tmp_path / "run", planted.parts(), ["vqä"], {"model": "größe"}, url)
    study.append([study.native], [{"vqä": 0.5}])
    again = Study(tmp_path / "run")
    assert (again.tasks, again.meta["model"], len(again.trials())) == (("vqä",), "größe", 1)
    close(study._storage)
    close(again._storage)


@pytest.mark.slow
def test_two_launchers_a_kill_and_a_database_that_goes_away(
    postgres: Postgres, tmp_path: Path, undisturbed: Study
) -> None:
    out = tmp_path / "shared"
    launchers = [start(out, "--storage", postgres.url) for _ in range(2)]
    eventually(lambda: answers(out) >= 2)
    postgres.stop()
    time.sleep(3)
    postgres.start()
    before = latest(out)
    eventually(lambda: latest(out) > before)
    launchers[0].send_signal(signal.SIGKILL)
    launchers[0].communicate()
    finished(launchers[1])
    assert finished(start(out, "--storage", postgres.url))["done"] == 9  # what the killed one was running, if anything
    study = Study(out)
    assert study.counts() == {"done": 9, "waiting": 0, "running": 0}
    pd.testing.assert_frame_equal(table(study), table(undisturbed), check_exact=True)
    close(study._storage)


@pytest.mark.slow
def test_a_database_that_is_away_at_the_start_is_waited_for_where_it_was_there_before(
    postgres: Postgres, tmp_path: Path
) -> None:
    out = tmp_path / "shared"
    assert finished(start(out, "--storage", postgres.url, "--bits", "8"))["done"] == 2
    postgres.stop()
    wrong = start(tmp_path / "new", "--storage", postgres.url, "--bits", "8")
    assert "cannot open the storage" in wrong.communicate(timeout=120)[0]  # it may be misspelled: not waited for
    assert wrong.returncode == 2
    later = start(out, "--storage", postgres.url, "--bits", "2,8")
    assert later.stderr is not None
    line = later.stderr.readline()
    while line and "waiting for it" not in line:
        line = later.stderr.readline()
    postgres.start()
    assert "cannot open the storage postgresql+psycopg://team@127.0.0.1" in line
    assert finished(later)["done"] == 9


def test_all_that_optuna_asks_of_a_database_is_waited_for(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the cache that Optuna puts before it, too, which calls what is not public."""
    monkeypatch.setattr("sensitivity.study.storage.retrying_storage.LONGEST_OUTAGE", 0.2)
    monkeypatch.setattr("sensitivity.study.storage.retrying_storage.RETRY_AFTER", 0.1)
    study = optuna.create_study(storage=open_storage(postgres.url))
    trial = study.ask()
    postgres.stop()
    for call in (study.get_trials, study.ask, lambda: trial.suggest_int("bits", 1, 16), lambda: study.user_attrs):
        with pytest.raises(UserError, match="the database has been away"):
            call()
    postgres.start()
    assert [trial.number for trial in study.get_trials()] == [0]
    close(study._storage)


def test_a_database_that_stays_away_is_one_sentence(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensitivity.study.storage.retrying_storage.LONGEST_OUTAGE", 1.0)
    storage = open_storage(postgres.url)
    postgres.stop()
    with pytest.raises(UserError, match=r"the database has been away for 1 seconds .*the same command continues"):
        storage.get_all_studies()
    postgres.start()
    assert storage.get_all_studies() == []
    close(storage)
    with pytest.raises(UserError, match="cannot open the storage postgresql"):
        open_storage(postgres.url.replace("/postgres", "/nowhere"))


@pytest.mark.slow
def test_a_ray_cluster_that_loses_an_actor(tmp_path: Path, undisturbed: Study) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    out = tmp_path / "cluster"
    launcher = start(out, "--executor", "ray", "--workers", "2")
    eventually(lambda: answers(out) >= 2)
    study = Study(out)
    owners: list[int] = []

    def at_work() -> bool:
        owners[:] = [t.user_attrs["owner"]["pid"] for t in study.optuna_study.get_trials() if t.state.name == "RUNNING"]
        return bool(owners)

    eventually(at_work)
    assert launcher.pid not in owners
    os.kill(owners[0], signal.SIGKILL)
    said, errors = launcher.communicate(timeout=300)
    assert json.loads(said)["done"] == 9
    assert "a worker was lost; the other workers run its plans" in errors
    assert study.counts() == {"done": 9, "waiting": 0, "running": 0}
    pd.testing.assert_frame_equal(table(Study(out)), table(undisturbed), check_exact=True)


@pytest.mark.slow
def test_an_actors_mistake_is_the_launchers_sentence(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    launcher = start(tmp_path / "out", "--executor", "ray", "--search", "gird")
    said, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 2
    assert "unknown search 'gird'" in json.loads(said)["error"]
    assert "Traceback" not in errors


@pytest.mark.slow
def test_an_address_of_no_cluster_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    said, _ = start(tmp_path / "out", "--executor", "ray").communicate(timeout=300)
    assert json.loads(said)["error"].startswith('RAY_ADDRESS is "nowhere" (Invalid address format: nowhere); unset it')
