"""The MLflow server of the manifests: as its container starts it, but for port and stores."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from clusters.local.ports import free_ports

pytest.importorskip("flask_wtf", reason="needs flask-wtf: the extra `dev`")

MANIFEST = Path(__file__).resolve().parents[2] / "clusters" / "kuberay" / "mlflow.yaml"
PASSWORD = "of-this-test-alone"


@pytest.fixture
def address(tmp_path):
    (server,) = (
        container
        for one in yaml.safe_load_all(MANIFEST.read_text())
        if one["kind"] == "Deployment"
        for container in one["spec"]["template"]["spec"]["containers"]
    )
    (port,) = free_ports(1)
    replaced = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--artifacts-destination": str(tmp_path / "artifacts"),
        "--allowed-hosts": f"localhost:{port}",
    }
    arguments = [
        f"{a}={replaced.get(a, b)}" for a, _, b in (w.partition("=") for w in server["args"])
    ]
    secrets = {"MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD, "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this"}
    names = {variable["name"] for variable in server["env"]}
    assert {*secrets, "MLFLOW_BACKEND_STORE_URI", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"} <= names
    environment = (
        os.environ
        | secrets
        | {
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/runs.db",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *server["command"], *arguments, "--workers=1"],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while status(f"http://localhost:{port}/health") != 200:
            told = (tmp_path / "log").read_text()
            assert process.poll() is None, told
            assert time.monotonic() < deadline, told
            time.sleep(0.5)
        yield f"http://localhost:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(20)


def status(url: str) -> int:
    try:
        return urllib.request.urlopen(url, timeout=5).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_mlflow_asks_for_the_password_and_its_own_name(address, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    client = MlflowClient(tracking_uri=address)
    run = client.create_run(client.create_experiment("e")).info.run_id
    client.log_metric(run, "m", 1.0)

    asked = f"{address}/api/2.0/mlflow/runs/get?run_id={run}"
    assert status(asked) == 401
    assert status(asked.replace("localhost", "127.0.0.1")) == 403
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a guess")
    with pytest.raises(MlflowException, match="401"):
        MlflowClient(tracking_uri=address).get_run(run)
