"""MLflow's store as people have it: tried before anything is trained, each fault one line."""

import http.server
import json
import os
import re
import shlex
import shutil
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from core.errors import ConfigError
from sweep.config.sweep import load_sweep
from sweep.driver.launch import run_sweep
from sweep.results.claim import claim
from sweep.tracking import mirror, store
from sweep.tracking.client import (
    Tracker,
    how_to_compare,
    kill_stale,
    known_runs,
    open_experiment,
    status_of,
    tracking_uri,
    ui_command,
)
from sweep.tracking.mirror import Mirror

QUICKSTART = "tests/data/sweep.yaml"
STRANGE = ("a b", "a%20b", "a%2Fb", "a?b#c", "it's", "ü;&$(x)")


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """A data base without an experiment of ours; to be copied, as its creation takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def storage(empty, tmp_path) -> Path:
    shutil.copy(empty, tmp_path / "mlflow.db")
    return tmp_path


def told(uri: str, storage: Path, name: str = "e") -> str:
    """The one line with which an experiment is refused."""
    with pytest.raises(ConfigError) as caught:
        open_experiment(uri, name, storage)
    assert "word" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", STRANGE)
def test_a_folder_of_any_name_holds_the_data_base_and_nothing_lies_beside_it(empty, tmp_path, name):
    storage = tmp_path / name
    storage.mkdir()
    shutil.copy(empty, storage / "mlflow.db")
    uri = tracking_uri(storage)
    experiment = open_experiment(uri, "e", storage)
    trial = Tracker(uri, experiment, "s/t")
    (storage / "note.txt").write_text("")
    trial.log_file(storage / "note.txt")
    trial.finish("FINISHED")
    with sqlite3.connect(storage / "mlflow.db") as base:
        assert base.execute("select name from experiments where name = 'e'").fetchall()
    assert list((storage / "mlartifacts").rglob("note.txt"))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(how_to_compare(uri, "e", "s").splitlines()) == 3
    command = ui_command(uri)
    assert shlex.split(command)[-2:] == ["--backend-store-uri", uri]


def test_what_is_printed_pastes_into_a_shell_and_restores_an_experiment(empty, tmp_path):
    storage = tmp_path / "it's a%2Fb ?"
    storage.mkdir()
    shutil.copy(empty, storage / "mlflow.db")
    uri = tracking_uri(storage)
    experiment = open_experiment(uri, "e", storage)
    client = MlflowClient(tracking_uri=uri)
    client.delete_experiment(experiment)
    line = told(uri, storage)
    assert line.startswith("experiment='e' was deleted in MLflow: restore it by `")
    assert line.endswith("`, or choose another with experiment=NAME")
    subprocess.run(line.split("`")[1], shell=True, check=True, capture_output=True)
    assert open_experiment(uri, "e", storage) == experiment


def test_a_deleted_experiment_is_told_before_a_sweep_claims_its_name(storage):
    keys = {"storage_path": str(storage), "name": "s"}
    sweep = load_sweep(QUICKSTART, keys)
    client = MlflowClient(tracking_uri=tracking_uri(storage))
    client.delete_experiment(client.create_experiment(sweep.experiment))
    with pytest.raises(ConfigError, match=r"experiment='feta-sweep' was deleted"):
        run_sweep(sweep)
    assert not sweep.folder.exists()
    claim(sweep)  # Also one that was begun goes on in another.
    claim(load_sweep(QUICKSTART, keys | {"experiment": "other"}))


def test_a_relative_file_stays_where_it_was_named(tmp_path, monkeypatch):
    (folder := tmp_path / "a%20b").mkdir()
    monkeypatch.chdir(folder)
    for given in ("sqlite:///own.db", "  sqlite:///own.db\n"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        uri = tracking_uri(tmp_path)
        assert store.file_of(uri) == folder / "own.db"
    for absolute in (f"sqlite:///{tmp_path}/own.db", "http://host:5000", "sqlite:///:memory:"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", absolute)
        assert tracking_uri(tmp_path) == absolute
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "  ")
    assert tracking_uri(tmp_path / "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "postgresql+psycopg2://me:word@127.0.0.1:9/b",
            r"at 'postgresql\+psycopg2://127.0.0.1:9/b'",
        ),
        ("mysql+absent://me:word@host/b", r"as it should .*correct MLFLOW_TRACKING_URI"),
        ("oracle://me:word@host/b", r"unsupported URI .*correct MLFLOW_TRACKING_URI"),
        ("./mlruns", r"maintenance mode .*mlflow migrate-filestore --help`, unset MLFLOW_TRACKING"),
        ("sqlite://", r"MLFLOW_TRACKING_URI=sqlite:// keeps nothing: name a file"),
        ("sqlite:///:memory:", r"keeps nothing: name a file"),
        ("sqlite:////proc/x.db", r"unable to open .*name another in MLFLOW_TRACKING_URI"),
        ("sqlite", r"Could not parse .*name another in MLFLOW_TRACKING_URI"),
        ("http://127.0.0.1:9", r"Connection refused>\): start the server, correct MLFLOW_TRACKING"),
        (
            "http://me:word@127.0.0.1:9",
            r"at 'http://127\.0\.0\.1:9' .*refused>\): start the server",
        ),
        ("http://127.0.0.1:port", r"nonnumeric port: 'port'\): start the server"),
        ("http://a host", r"control characters.*: start the server"),
        ("http://", r"no host given>\): start the server"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_line(tmp_path, uri, message):
    storage = tmp_path / "runs"
    assert re.search(message, told(uri, storage))
    assert len(how_to_compare(uri, "e", "s").splitlines()) <= 2
    assert not storage.exists()


@pytest.fixture(params=[(200, r"not in a valid JSON"), (404, r"404"), (500, r"500"), (0, r"SSH")])
def other_server(request) -> Iterator[tuple[str, str]]:
    """Address of a server that is not MLflow's, and what it is told by; 0: not even of HTTP."""
    code, message = request.param

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b"<html>another</html>")

        def handle(self):
            super().handle() if code else self.request.sendall(b"SSH-2.0-OpenSSH_9\r\n")

        def do_POST(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", message
        server.shutdown()


def test_a_server_that_is_not_mlflow_is_one_line(other_server, tmp_path):
    uri, message = other_server
    assert re.search(f"{message}.*start the server, correct MLFLOW_TRACKING", told(uri, tmp_path))


def test_a_file_that_cannot_be_used_is_one_line(storage, monkeypatch):
    path = storage / "mlflow.db"
    uri = f"sqlite:///{path}"
    content = path.read_bytes()
    monkeypatch.setattr(store, "_LOCKED", 0.1)
    with sqlite3.connect(path, isolation_level=None) as holder:
        holder.execute("begin exclusive")
        assert "(OperationalError: database is locked): stop what holds the file" in told(
            uri, storage
        )
        holder.execute("rollback")
        holder.execute("update alembic_version set version_num = 'cc1f77228345'")  # MLflow 1.28.
    assert re.search(
        f"copy the data base, then run `\\S+/mlflow db upgrade {uri}`", told(uri, storage)
    )
    for damaged in (b"hello" * 1000, content[:20_000]):
        path.write_bytes(damaged)
        assert "restore it, or name another in MLFLOW_TRACKING_URI" in told(uri, storage)
    assert "pip install mysqlclient" in told("mysql://me:word@host/b", storage)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("s3://bucket/x", r"No module named 'boto3'.*: pip install boto3|import of boto3"),
        ("gs://bucket/x", r": pip install google-cloud-storage"),
        ("/proc/nowhere", r"files at '/proc/nowhere', which cannot be used from here .*NAME"),
        ("other://x", r"other://x.*: give access to it, or choose another with experiment=NAME"),
        ("mlflow-artifacts:/x", r"mlflow-artifacts.*: give access to it, or choose another"),
    ],
)
def test_a_place_for_files_that_cannot_be_used_is_one_line(storage, monkeypatch, location, message):
    for module in ("boto3", "google.cloud.storage"):
        monkeypatch.setitem(sys.modules, module, None)
    uri = tracking_uri(storage)
    MlflowClient(tracking_uri=uri).create_experiment("e", artifact_location=location)
    assert re.search(message, told(uri, storage))


def test_a_run_that_was_deleted_is_written_again_and_an_ended_one_stays_deleted(
    storage, monkeypatch
):
    monkeypatch.setattr(mirror, "_INTERVAL", 0.05)
    sweep = load_sweep(QUICKSTART, {"storage_path": str(storage), "name": "s"})
    uri = tracking_uri(storage)
    experiment = open_experiment(uri, sweep.experiment, storage)
    client = MlflowClient(tracking_uri=uri)
    folder = sweep.folder / "trials" / "t"
    folder.mkdir(parents=True)
    (sweep.folder / "sweep.json").write_text("{}")

    def runs() -> dict[str, Any]:
        return {run.info.run_name: run for run in client.search_runs([experiment])}

    def states() -> dict[str, str]:
        known = known_runs(uri, sweep.experiment, "s")
        return {key: status_of(run) for key, run in known.items()}

    def wait_for_step(step: int) -> None:
        end = time.monotonic() + 60
        while (run := runs().get("t")) is None or run.data.metrics.get("step") != step:
            assert time.monotonic() < end
            time.sleep(0.1)

    told = Mirror(sweep, 0, uri, 1)
    told.begin([])
    told.started("t", {})
    for step in (1, 2):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"stage": "warm_up", "step": step, "loss": 0.5}) + "\n")
        if step == 1:
            wait_for_step(1)
            run = runs()["t"]
            client.delete_run(run.info.run_id)
    wait_for_step(2)
    history = client.get_metric_history(run.info.run_id, "warm_up/loss")
    assert [point.step for point in history] == [1, 2]
    assert runs()["t"].info.run_id == run.info.run_id
    told.ended("t", {"failure": "out of luck"})
    assert told.close(5.0, "FINISHED") == 0
    assert states() == {"s": "FINISHED", "s/t": "FAILED"}

    first = runs()["s"]
    for deleted in (run.info.run_id, first.info.run_id):
        client.delete_run(deleted)
    assert states() == {"s": "DELETED", "s/t": "DELETED"}
    again = Tracker(uri, experiment, "s/t", first.info.run_id)
    assert again.run_id != run.info.run_id
    assert states() == {"s": "DELETED", "s/t": "RUNNING"}
    parent = Tracker(uri, experiment, "s")
    kill_stale(uri, sweep.experiment, parent.run_id, "s")
    assert runs()["t"].data.tags["mlflow.parentRunId"] == parent.run_id
    assert states() == {"s": "RUNNING", "s/t": "KILLED"}


def test_a_selection_creates_nothing_in_mlflow_before_its_end(tmp_path, storage):
    """The times of what was created would tell how long its trials took."""
    absent = tmp_path / "absent"
    for _ in range(2):
        assert open_experiment(tracking_uri(absent), "e", absent, create=False) == ""
        assert not list(absent.iterdir())
    uri = tracking_uri(storage)
    assert open_experiment(uri, "e", storage, create=False) == ""
    client = MlflowClient(tracking_uri=uri)
    assert client.get_experiment_by_name("e") is None
    made = open_experiment(uri, "e", storage)
    assert open_experiment(uri, "e", storage, create=False) == made
    client.delete_experiment(made)
    with pytest.raises(ConfigError, match=r"experiment='e' was deleted"):
        open_experiment(uri, "e", storage, create=False)


def test_the_run_of_a_model_is_restored_or_made_anew(storage):
    uri = tracking_uri(storage)
    experiment = open_experiment(uri, "e", storage)
    client = MlflowClient(tracking_uri=uri)
    parent = Tracker(uri, experiment, "s")
    trial = Tracker(uri, experiment, "s/t", parent.run_id)
    assert parent._run_of("t") == trial.run_id
    client.delete_run(trial.run_id)
    assert parent._run_of("t") == trial.run_id
    assert client.get_run(trial.run_id).info.lifecycle_stage == "active"
    client.delete_run(trial.run_id)
    again = Tracker(uri, experiment, "s/t", parent.run_id)
    assert parent._run_of("t") == again.run_id != trial.run_id
    new = client.get_run(parent._run_of("gone"))
    assert new.data.tags["mlflow.parentRunId"] == parent.run_id


def test_a_password_of_a_server_is_used_and_not_shown(tmp_path):
    """The sign of life is asked for without it, as no part of an address for `urllib`."""
    asked: list[tuple[str, str | None]] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(200 if self.path == "/health" else 403)
            self.end_headers()

        def do_POST(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told(f"http://me:word@127.0.0.1:{server.server_address[1]}", tmp_path)
        server.shutdown()
    assert [path for path, _ in asked] == ["/health", asked[-1][0]]
    assert asked[-1][1].startswith("Basic ")


def test_a_data_base_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    """Of an interrupted start nothing stays, as MLflow does not go on with some of its tables."""
    file = tmp_path / "new" / "mlflow.db"
    uri = f"sqlite:///{file}"
    with monkeypatch.context() as patch:

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(os, "link", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.reachable(uri)
    assert [*file.parent.iterdir()] == []
    store.reachable(uri)
    assert [each.name for each in file.parent.iterdir()] == ["mlflow.db"]
    with sqlite3.connect(file) as tables:
        assert tables.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)
