"""Records of a run while the MLflow server is stopped: in a file, sent in order, none twice."""

import pytest
from lab import RATE, ROOT, Lab, wait_for
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from sweep.config.sweep import load_sweep
from sweep.tracking.client import open_experiment
from sweep.tracking.content import Place
from sweep.tracking.outbox import OUTBOX, Outbox
from sweep.tracking.recorder import Recorder

QUICKSTART = ROOT / "sweep" / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def server(lab: Lab) -> Lab:
    if lab.server is None:
        lab.start_server()
    return lab


def test_what_was_logged_while_the_server_was_away_arrives_once(server: Lab, tmp_path):
    uri = server.environment["MLFLOW_TRACKING_URI"]
    experiment = open_experiment(uri, "away", tmp_path)
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"png")
    box = Outbox(tmp_path, uri, experiment, "s/t")
    box.log_params({"a": 1, "b": None})
    box.log_step(1, {"loss": 1.0})
    assert not box.waiting
    server.stop_server()
    for step in (2, 3, 4):
        box.log_step(step, {"loss": 1.0 / step})
    assert box.waiting
    assert not box.flush(0.5), "nothing can be sent"

    with (tmp_path / OUTBOX).open("a") as file:
        file.write('["log_step", [5, {"mapp')  # The trial's process is killed as it writes.
    restarted = Outbox(tmp_path, uri, experiment, "s/t")
    restarted.log_step(3, {"loss": 1.0 / 3})
    restarted.log_file(picture, "synthetic")
    restarted.finish("FINISHED")
    server.start_server()
    assert restarted.flush(60)
    assert not restarted.waiting

    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"a": "1", "b": "None"}
    points = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((p.step, p.value) for p in points) == [(n, 1.0 / n) for n in (1, 2, 3, 4)]
    assert [a.path for a in client.list_artifacts(run.info.run_id, "synthetic")] == [
        "synthetic/grid.png"
    ]


def test_what_a_trial_left_is_sent_as_soon_as_the_server_answers_again(server: Lab, tmp_path):
    uri = server.environment["MLFLOW_TRACKING_URI"]
    experiment = open_experiment(uri, "late", tmp_path)
    sweep = load_sweep(QUICKSTART, {"storage_path": str(tmp_path), "name": "late"})
    recorder = Recorder(sweep, 0, Place("late", uri, experiment, ""), print)
    server.stop_server()
    recorder.started("one", {RATE: 0.001})
    recorder.ended("one", {"failure": "out of luck"})
    recorder.started("two", {RATE: 0.002})
    outboxes = sweep.folder / "trials"
    wait_for(lambda: len(list(outboxes.glob(f"*/{OUTBOX}"))) == 2, "outboxes", 60)
    server.start_server()

    def sent() -> bool:
        recorder.reported("two", {"stage": "warm_up", "step": 1})
        return not list(outboxes.glob(f"*/{OUTBOX}"))

    wait_for(sent, "records", 60, every=1)
    runs = MlflowClient(tracking_uri=uri).search_runs([experiment])
    assert sorted(run.info.status for run in runs) == ["FAILED", "RUNNING"]
    recorder.close(0.0)


def test_what_the_server_refuses_is_an_error_not_a_delay(server: Lab, tmp_path):
    uri = server.environment["MLFLOW_TRACKING_URI"]
    box = Outbox(tmp_path, uri, open_experiment(uri, "away", tmp_path), "s/u")
    with pytest.raises(MlflowException, match="Invalid"):
        box.log_metrics({"a name with\nbreaks": 1.0})
    assert not box.waiting
