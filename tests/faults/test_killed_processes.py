"""One sweep on a cluster, of whose processes one after the other is killed or goes away."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import Lab, Sweep, Undisturbed, assert_as_undisturbed, holder, wait_for
from leftovers import MARK, OF_TRIALS, assert_none_left
from mlflow.tracking import MlflowClient

from sweep.results.driver import running_driver

RATES = [1e-4, 1e-3]
STEPS = 90
AWAY_SECONDS = 60


@pytest.fixture(scope="module")
def story(cluster: Lab) -> tuple[Sweep, list[str]]:
    """Tells the sweep's story; returns it with what its three jobs printed."""
    sweep = cluster.sweep("story", RATES, steps=STEPS)

    def until_it_goes_on(trial: Path, before: int) -> None:
        """Waits for a step of the trial by another worker than `before`."""
        steps = (trial / "metrics.jsonl").read_text()
        wait_for(lambda: holder(trial) not in (0, before), "restart of the trial")
        wait_for(lambda: (trial / "metrics.jsonl").read_text() != steps, "step of the trial")

    def kill(title: str) -> None:
        pids = cluster.processes(title)
        assert pids, f"no process {title}"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def lose(act: Callable[[], None]) -> None:
        """Does something that ends the first trial's workers; waits until others go on."""
        worker = holder(first)
        act()
        until_it_goes_on(first, worker)

    sweep.submit("first")
    first = sweep.wait_for_trial()
    kill("ray::Keeper")  # Of the ledgers; who asks waits for the next one.
    lose(lambda: os.kill(holder(first), signal.SIGKILL))
    lose(lambda: kill("ray::TrainController"))
    lose(lambda: kill("ray::ImplicitFunc"))  # The trial.
    cluster.stop_server()
    away = time.monotonic()
    second = sweep.wait_for_trial(first)
    worker = holder(second)
    driver = running_driver(sweep.config.folder)
    assert driver is not None
    os.kill(driver.pid, signal.SIGKILL)
    sweep.wait_for_state("first", "FAILED")
    assert_none_left(cluster.environment[MARK], 180, OF_TRIALS)
    told = [sweep.printed("first")]
    time.sleep(max(0.0, away + AWAY_SECONDS - time.monotonic()))
    cluster.start_server()
    sweep.submit("second")
    until_it_goes_on(second, worker)
    sweep.stop("second")
    told.append(sweep.printed("second"))
    sweep.submit("third")
    sweep.wait_for_state("third", "SUCCEEDED", "FAILED", "STOPPED")
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
        use = client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")
        assert expected <= {m.step for m in use}, "machine use was lost with a driver"


def test_no_process_is_left(story, cluster: Lab):
    assert_none_left(cluster.environment[MARK], 180, OF_TRIALS)


def test_on_a_local_cluster_a_trial_goes_on_and_a_killed_driver_leaves_no_process(lab: Lab):
    """Without Ray's dashboard; what the supervisor that is killed holds is all that there is."""
    alone = {key: value for key, value in lab.environment.items() if key != "RAY_ADDRESS"}
    here = Lab(lab.folder, alone | {MARK: f"{lab.folder}/local"})
    cores = os.cpu_count() or 1
    sweep = here.sweep("local", [1e-3], f"workers_per_trial: 1\ncpus_per_worker: {cores}")
    driver = sweep.start()
    try:
        trial = sweep.wait_for_trial(process=driver)
        worker = holder(trial)
        (supervisor,) = here.processes("ray::TrainController")
        os.kill(supervisor, signal.SIGKILL)
        wait_for(lambda: holder(trial) not in (0, worker), "restart of the trial")
        driver.kill()
        driver.communicate(timeout=60)
        assert_none_left(here.environment[MARK], 180)
    finally:
        here.end()
    (entry,) = sweep.ledger().summary()["entries"]
    assert entry["state"] == "reserved", "what may have run is not given back"
