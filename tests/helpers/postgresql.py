"""A PostgreSQL server of Debian's package in a folder of its own, behind a Unix socket, for as long as a test lasts."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USER = "postgres"  # who runs it where tests run as root, which the server refuses to be


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One that answers."""

    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """As `--study` takes it."""
        return f"postgresql://{USER}@/{USER}?host={self.folder}"

    def stop(self) -> None:
        """End at once, as a power cut would; connections break."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(timeout=60)


def binaries() -> Path | None:
    """The folder of `initdb` and `postgres`; None where they are not installed, or nobody may run them."""
    found = [*sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)]
    if (on_path := shutil.which("initdb")) is not None:
        found.append(Path(on_path).resolve())
    if os.geteuid() == 0 and USER not in {entry.pw_name for entry in pwd.getpwall()}:
        return None
    return found[0].parent if found else None


@contextmanager
def running(programs: Path) -> Iterator[Server]:
    """A fresh server with an empty database; it and its folder are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="flyball-pg-"))  # short, for a socket's path has at most 107 characters
    owner: dict[str, Any] = {}
    if os.geteuid() == 0:
        entry = pwd.getpwnam(USER)
        owner = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        os.chown(folder, entry.pw_uid, entry.pw_gid)
    folder.chmod(0o755)
    data, log = folder / "data", folder / "log"
    try:
        subprocess.run(
            [programs / "initdb", "-D", data, "-A", "trust", "-U", USER, "--no-sync", "-E", "UTF8"],
            cwd=folder, check=True, capture_output=True, **owner,
        )  # fmt: skip
        with log.open("wb") as out:
            process = subprocess.Popen(
                [programs / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"],
                cwd=folder, stdout=out, stderr=out, **owner,
            )  # fmt: skip
        server = Server(folder=folder, process=process)
        try:
            _until_it_answers(server, log)
            yield server
        finally:
            if process.poll() is None:
                server.stop()
    finally:
        shutil.rmtree(folder)


def _until_it_answers(server: Server, log: Path) -> None:
    import psycopg

    while True:
        try:
            psycopg.connect(server.url).close()
            return
        except psycopg.OperationalError as error:
            if server.process.poll() is not None:
                raise AssertionError(log.read_text()) from error
            time.sleep(0.05)
