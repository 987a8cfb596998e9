"""MLflow's records: found again rather than made twice, each step once, statuses true."""

import json

from mlflow.tracking import MlflowClient

from sweep.tracking import Tracker, kill_stale, open_experiment, tracking_uri, ui_command


def test_runs_are_found_again_and_steps_logged_once(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = tracking_uri(tmp_path)
    assert uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert uri in ui_command(uri)
    experiment = open_experiment(uri, "e", tmp_path)
    assert open_experiment(uri, "e", tmp_path) == experiment
    parent = Tracker(uri, experiment, "s")
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"png")

    first = Tracker(uri, experiment, "s/t1", parent.run_id)
    first.log_params({f"k{i}": i for i in range(150)})
    for step in (10, 20):
        first.log_step(step, {"loss": 1.0 / step})
    kill_stale(uri, experiment, parent.run_id, "s")
    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(first.run_id).info.status == "KILLED"
    assert client.get_run(parent.run_id).info.status == "RUNNING"

    again = Tracker(uri, experiment, "s/t1", parent.run_id)
    assert again.run_id == first.run_id
    again.log_params({"k0": 0, "new": 1})
    for step in (10, 20, 30):
        again.log_step(step, {"loss": 1.0 / step})
    reports = [{"stage": "warm_up", "step": step, "loss": 1.0 / step} for step in (20, 25, 30)]
    reports.append({"stage": "evaluation", "step": 30})
    lines = [json.dumps(report) for report in reports]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    again.log_missing_steps(tmp_path / "metrics.jsonl")
    again.log_file(picture, "synthetic")
    again.log_file(tmp_path / "absent.png")
    again.finish("FINISHED")

    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == 151
    assert [m.step for m in client.get_metric_history(first.run_id, "loss")] == [10, 20, 30]
    lost = client.get_metric_history(first.run_id, "warm_up/loss")
    assert [(m.step, m.value) for m in lost] == [(25, 1 / 25)]
    assert [a.path for a in client.list_artifacts(first.run_id, "synthetic")] == [
        "synthetic/grid.png"
    ]
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    children = client.search_runs(
        [experiment], filter_string=f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    )
    assert len(children) == 1


def test_the_users_server_is_honoured(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    assert tracking_uri(tmp_path) == "http://tracking.example:5000"
    assert ui_command("http://tracking.example:5000") == "open http://tracking.example:5000"
