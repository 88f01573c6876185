"""A PostgreSQL server of our own, from the system's package, that can be stopped and started again."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
from pathlib import Path


def initdb() -> Path | None:
    """Where the system's package (Debian's postgresql) keeps its programs, if it is installed."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = shutil.which("initdb")
    return Path(found) if found else programs[-1] if programs else None


class Postgres:
    """Its data lie in a folder that other users may enter: as root, the server runs as the user postgres."""

    def __init__(self, folder: Path) -> None:
        found = initdb()
        assert found is not None
        self.programs, self.data = found.parent, folder / "data"
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
