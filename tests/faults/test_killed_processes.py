"""One sweep on a cluster, of whose processes one after the other is killed or goes away."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from lab import MARK, Lab, Sweep, Undisturbed, assert_as_undisturbed, holder, wait_for
from mlflow.tracking import MlflowClient

from sweep.driver import running_driver

RATES = [1e-4, 1e-3, 5e-3]
STEPS = 120
AWAY_SECONDS = 60
ACTORS = ("ray::TrainController", "ray::ImplicitFunc", "ray::execute", "ray::RayTrainWorker")


def actors(lab: Lab) -> list[int]:
    """Processes that work for a trial."""
    return [pid for title in ACTORS for pid in lab.processes(title)]


@pytest.fixture(scope="module")
def story(cluster: Lab) -> tuple[Sweep, list[str]]:
    """Tells the sweep's story; returns it with what its three jobs printed."""
    sweep = cluster.sweep("story", RATES, steps=STEPS)
    disturbed: list[Path] = []

    def next_trial() -> None:
        disturbed.append(sweep.wait_for_trial(*disturbed))

    def until_it_goes_on(before: int) -> None:
        """Waits for a step of the same trial by another worker than `before`."""
        trial = disturbed[-1]
        steps = (trial / "metrics.jsonl").read_text()
        wait_for(lambda: holder(trial) not in (0, before), "restart of the trial")
        wait_for(lambda: (trial / "metrics.jsonl").read_text() != steps, "step of the trial")

    def kill(title: str) -> None:
        pids = cluster.processes(title)
        assert pids, f"no process {title}"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    sweep.submit("first")
    next_trial()
    worker = holder(disturbed[-1])
    os.kill(worker, signal.SIGKILL)
    until_it_goes_on(worker)
    worker = holder(disturbed[-1])
    kill("ray::TrainController")
    until_it_goes_on(worker)
    worker = holder(disturbed[-1])
    kill("ray::ImplicitFunc")  # The trial.
    until_it_goes_on(worker)
    cluster.stop_server()
    away = time.monotonic()
    next_trial()
    driver = running_driver(sweep.config.folder)
    assert driver is not None
    os.kill(driver.pid, signal.SIGKILL)
    wait_for(lambda: sweep.state("first") == "FAILED", "end of the killed job")
    wait_for(lambda: not actors(cluster), "end of the killed job's processes", 180)
    told = [sweep.printed("first")]
    time.sleep(max(0.0, away + AWAY_SECONDS - time.monotonic()))
    cluster.start_server()
    sweep.submit("second")
    next_trial()
    sweep.stop("second")
    told.append(sweep.printed("second"))
    sweep.submit("third")
    wait_for(lambda: sweep.state("third") not in ("PENDING", "RUNNING"), "end of the last job")
    told.append(sweep.printed("third"))
    assert sweep.state("third") == "SUCCEEDED", told
    return sweep, told


def test_every_trial_ends_as_if_nothing_had_happened(story, undisturbed: Undisturbed):
    sweep, _ = story
    assert_as_undisturbed(sweep, undisturbed)


def test_no_trial_failed_and_nothing_of_ray_was_printed(story):
    _, told = story
    assert "its process died, restarted" in told[0]
    assert "the same command goes on where it stopped" in told[1]
    assert "best trial: " in told[2]
    for text in told:
        assert " failed" not in text
        assert "(raylet)" not in text
        assert "Traceback" not in text


def test_the_server_has_every_trial_and_every_step_once(story, cluster: Lab):
    sweep, _ = story
    client = MlflowClient(tracking_uri=cluster.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("feta-sweep")
    assert experiment is not None
    runs = client.search_runs(
        [experiment.experiment_id], filter_string="tags.`sweep.key` LIKE 'story/%'"
    )
    assert [run.info.status for run in runs] == ["FINISHED"] * len(RATES)
    for run in runs:
        reports = map(json.loads, (sweep.trials / run.info.run_name / "metrics.jsonl").open())
        expected = {report["step"] for report in reports if "loss" in report}
        assert expected >= {*range(STEPS // 4 + 5, STEPS + 1, 5)}
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "step")]
        assert expected <= set(steps), "steps are missing"
        assert len(steps) == len(set(steps)), "a step is there twice"
        assert "accuracy" in run.data.metrics
        artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
        assert artifacts >= {"config.yaml", "privacy.json", "synthetic"}
    assert not list(sweep.config.folder.rglob("mlflow_outbox*"))


def test_no_process_is_left(story, cluster: Lab):
    wait_for(lambda: not actors(cluster), "end of the sweep's processes", 180)


def test_the_killed_driver_of_a_local_cluster_leaves_no_process(cluster: Lab):
    alone = {key: value for key, value in cluster.environment.items() if key != "RAY_ADDRESS"}
    here = Lab(cluster.folder, alone | {MARK: f"{cluster.folder}/local"})
    sweep = here.sweep("local", [1e-3], "workers_per_trial: 1")
    driver = sweep.start()
    try:
        sweep.wait_for_trial(process=driver)
        driver.kill()
        driver.communicate(timeout=60)
        wait_for(lambda: not here.processes(), "end of all that the driver started", 180)
    finally:
        here.end()
    (entry,) = sweep.ledger().summary()["entries"]
    assert entry["state"] == "reserved", "what may have run is not given back"
