"""The mirror of a sweep while the MLflow server is stopped: nothing lost, nothing twice."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import RATE, ROOT, Lab, wait_for
from mlflow.tracking import MlflowClient
from PIL import Image

from sweep.config.sweep import SweepConfig, load_sweep
from sweep.tracking.client import open_experiment
from sweep.tracking.mirror import Mirror

QUICKSTART = ROOT / "tests" / "data" / "sweep.yaml"


@pytest.fixture(scope="module")
def server(lab: Lab) -> Lab:
    if lab.server is None:
        lab.start_server()
    return lab


@pytest.fixture
def sweep(server: Lab, tmp_path: Path, request) -> Iterator[SweepConfig]:
    name = request.node.originalname
    sweep = load_sweep(QUICKSTART, {"storage_path": str(tmp_path), "name": "s", "experiment": name})
    open_experiment(server.environment["MLFLOW_TRACKING_URI"], name, tmp_path)
    sweep.folder.mkdir()
    (sweep.folder / "sweep.json").write_text("{}")
    yield sweep
    if server.server is None:
        server.start_server()


def reported(sweep: SweepConfig, trial: str, *steps: int) -> None:
    folder = sweep.folder / "trials" / trial
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            report = {"stage": "warm_up", "step": step, "loss": 1 / step}
            file.write(json.dumps(report) + "\n")


def statuses(server: Lab, sweep: SweepConfig) -> dict[str, str]:
    client = MlflowClient(tracking_uri=server.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(sweep.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return {run.info.run_name: run.info.status for run in runs}


def test_what_happened_while_the_server_was_away_arrives_once(server: Lab, sweep: SweepConfig):
    """Of a trial that goes on, and of one that began and ended meanwhile."""
    uri = server.environment["MLFLOW_TRACKING_URI"]
    mirror = Mirror(sweep, 0, uri, 2)
    mirror.begin([])
    reported(sweep, "one", 1, 2)
    mirror.started("one", {RATE: 0.001})
    wait_for(lambda: "one" in statuses(server, sweep), "the first trial", 60)
    server.stop_server()
    reported(sweep, "one", 3, 4)
    picture = sweep.folder / "trials" / "one" / "samples" / "00000002.png"
    picture.parent.mkdir()
    Image.new("L", (12, 12)).save(picture)
    reported(sweep, "two", 1)
    mirror.started("two", {RATE: 0.002})
    mirror.ended("two", {"failure": "out of luck"})
    time.sleep(8)  # It is asked, in vain.
    server.start_server()
    wait_for(lambda: statuses(server, sweep).get("two") == "FAILED", "the second trial", 90)
    reported(sweep, "one", 5)
    assert mirror.close(60, "FINISHED") == 0
    assert statuses(server, sweep) == {"s": "FINISHED", "one": "KILLED", "two": "FAILED"}
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(sweep.experiment)
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    for trial, steps in (("one", (1, 2, 3, 4, 5)), ("two", (1,))):
        points = client.get_metric_history(runs[trial].info.run_id, "warm_up/loss")
        assert sorted((p.step, p.value) for p in points) == [(n, 1 / n) for n in steps]
    images = client.list_artifacts(runs["one"].info.run_id, "images")
    assert len(images) == 2  # In full and as a preview.


def test_a_server_that_stays_away_is_waited_for_only_so_long(server: Lab, sweep: SweepConfig):
    """What it lacks is told by the next driver."""
    uri = server.environment["MLFLOW_TRACKING_URI"]
    mirror = Mirror(sweep, 0, uri, 1)
    mirror.begin([])
    wait_for(lambda: "s" in statuses(server, sweep), "the sweep", 60)
    server.stop_server()
    reported(sweep, "one", 1)
    mirror.started("one", {RATE: 0.001})
    began = time.monotonic()
    assert mirror.close(3.0, "FINISHED") == 2
    assert time.monotonic() - began < 60
    server.start_server()
    assert statuses(server, sweep) == {"s": "RUNNING"}
    again = Mirror(sweep, 0, uri, 1)
    again.begin([])
    again.started("one", {RATE: 0.001})
    assert again.close(60, "KILLED") == 0
    assert statuses(server, sweep) == {"s": "KILLED", "one": "KILLED"}
