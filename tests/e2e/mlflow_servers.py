"""Real MLflow servers, on SQLite and on a PostgreSQL that is started for the test."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusters.local.ports import free_ports


@contextlib.contextmanager
def mlflow_server(folder: Path, store: str) -> Iterator[str]:
    """Yields the address of a server that keeps its runs in `store`, its artifacts in `folder`."""
    (port,) = free_ports(1)
    hosts = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--allowed-hosts", hosts]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (
        (folder / "server.log").open("w") as log,
        running(command, stdout=log, stderr=log, env=environment, cwd=folder) as process,
    ):
        deadline = time.monotonic() + 180
        while not _answers(f"http://{hosts}/health"):
            told = (folder / "server.log").read_text()
            assert process.poll() is None, told
            assert time.monotonic() < deadline, told
            time.sleep(0.5)
        yield f"http://{hosts}"


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """Yields the address of a new data base of a cluster of its own."""
    programs = {name: _program(name) for name in ("initdb", "postgres")}
    if None in programs.values():
        pytest.skip("no PostgreSQL (initdb, postgres) found: apt-get install -y postgresql")
    psycopg2 = pytest.importorskip("psycopg2", reason="needs psycopg2-binary: the extra `dev`")
    user = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root.
        user = "nobody"
    with tempfile.TemporaryDirectory(prefix="feta-postgresql-") as folder:
        data, (port,) = Path(folder) / "data", free_ports(1)
        if user:
            shutil.chown(folder, user)
        quiet = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL}
        command = [programs["initdb"], "-D", data, "-U", "mlflow", "-A", "trust", "--no-sync"]
        subprocess.run(command, check=True, **quiet)
        command = [programs["postgres"], "-D", data, "-p", str(port), "-h", "127.0.0.1"]
        command += ["-k", "", "-c", "fsync=off"]
        address = f"mlflow@127.0.0.1:{port}/postgres"
        with running(command, **quiet, stderr=subprocess.DEVNULL):
            deadline = time.monotonic() + 60
            while not _accepts(psycopg2, f"postgresql://{address}"):
                assert time.monotonic() < deadline, "PostgreSQL did not start"
                time.sleep(0.2)
            yield f"postgresql+psycopg2://{address}"  # Alone, SQLAlchemy 2.1 means psycopg 3.


@contextlib.contextmanager
def running(command: list, **options) -> Iterator[subprocess.Popen]:
    """A process that is asked to end, with all that it started, when the block ends."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _program(name: str) -> str | None:
    """Debian keeps PostgreSQL's programs off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(found[-1]) if found else None)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _accepts(psycopg2: Any, uri: str) -> bool:
    try:
        psycopg2.connect(uri).close()
        return True
    except psycopg2.OperationalError:
        return False
