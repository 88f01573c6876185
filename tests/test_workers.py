"""Many workers on one study: a real PostgreSQL that goes away, a Ray cluster that loses an actor, launchers killed."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
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

from sensitivity.errors import UserError
from sensitivity.storage import close, open_storage
from sensitivity.trials import Study

SWEEP = "sweep embedded:scenes-llava --bits 2,8 --method uniform --n 40 --json"


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sensitivity", *SWEEP.split(), "--out", str(out), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> dict[str, object]:
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(said)  # type: ignore[no-any-return]


def eventually(happened: Callable[[], bool], seconds: float = 120) -> None:
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < seconds, "it never happened"
        time.sleep(0.05)


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


class Postgres:
    """A server of our own, from the system's package, that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        found = shutil.which("initdb") or (str(programs[-1]) if programs else None)
        if found is None:
            pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
        pytest.importorskip("psycopg", reason="psycopg is not installed (extra postgres)")
        self.programs, self.data = Path(found).parent, folder / "data"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        if os.getuid() == 0:  # the server refuses to run as root
            person = pwd.getpwnam("postgres")
            os.chown(folder, person.pw_uid, person.pw_gid)
        self._run("initdb", "-D", str(self.data), "-U", "team", "-A", "trust", "--no-sync")

    def _run(self, program: str, *words: str) -> None:
        command = [str(self.programs / program), *words]
        if os.getuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")

    def start(self) -> None:
        options = f"-p {self.port} -k {self.data} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run("pg_ctl", "-D", str(self.data), "-o", options, "-w", "-l", str(self.data / "log"), "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.data), "-m", "immediate", "-w", "stop")

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://team@127.0.0.1:{self.port}/postgres"


@pytest.fixture
def postgres() -> Iterator[Postgres]:
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
    assert "cannot open the storage" in wrong.communicate(timeout=120)[0]  # it may be misspelt: not waited for
    assert wrong.returncode == 1
    later = start(out, "--storage", postgres.url, "--bits", "2,8")
    assert later.stderr is not None
    line = later.stderr.readline()
    while line and "waiting for it" not in line:
        line = later.stderr.readline()
    postgres.start()
    assert "note: cannot open the storage postgresql+psycopg://team@127.0.0.1" in line
    assert finished(later)["done"] == 9


def test_all_that_optuna_asks_of_a_database_is_waited_for(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the cache that Optuna puts before it, too, which calls what is not public."""
    monkeypatch.setattr("sensitivity.storage.PATIENCE", 0.2)
    monkeypatch.setattr("sensitivity.storage.AGAIN", 0.1)
    study = optuna.create_study(storage=open_storage(postgres.url))
    trial = study.ask()
    postgres.stop()
    for call in (study.get_trials, study.ask, lambda: trial.suggest_int("bits", 1, 16), lambda: study.user_attrs):
        with pytest.raises(UserError, match="the database has been away"):
            call()
    postgres.start()
    assert [trial.number for trial in study.get_trials()] == [0]
    close(study._storage._backend)  # type: ignore[attr-defined]


def test_a_database_that_stays_away_is_one_sentence(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensitivity.storage.PATIENCE", 1.0)
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
    assert "note: a worker was lost; what it was running is run by others" in errors
    assert study.counts() == {"done": 9, "waiting": 0, "running": 0}
    pd.testing.assert_frame_equal(table(Study(out)), table(undisturbed), check_exact=True)


def test_an_actors_mistake_is_the_launchers_sentence(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    launcher = start(tmp_path / "out", "--executor", "ray", "--search", "gird")
    said, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 1
    assert "unknown search 'gird'" in json.loads(said)["error"]
    assert "Traceback" not in errors
