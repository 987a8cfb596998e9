"""MLflow's records: found again rather than made twice, each step once, statuses true."""

import base64
import json
import math
import time
import zlib
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image

from core.io.files import to_json, write_json
from sweep.config.sweep import load_sweep, trial_id_of
from sweep.tracking.client import (
    Tracker,
    how_to_compare,
    kill_stale,
    open_experiment,
    tracking_uri,
    ui_command,
)
from sweep.tracking.content import Place
from sweep.tracking.outbox import OUTBOX, Outbox
from sweep.tracking.recorder import Recorder


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """A data base that all tests use, as its creation takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("tracking")
        uri = tracking_uri(folder)
    assert uri == f"sqlite:///{folder}/mlflow.db"
    assert uri in ui_command(uri)
    return uri


def test_runs_are_found_again_and_steps_logged_once(tmp_path, uri):
    experiment = open_experiment(uri, "again", tmp_path)
    assert open_experiment(uri, "again", tmp_path) == experiment
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


RATE = "private_training.learning_rate"
SCORED = {"accuracy": 0.7, "epsilon": 1.0, "noise_multiplier": 2.0, "seconds": 3.0}
DONE = {"stage": "done", "step": 4, **SCORED}


@pytest.fixture
def sweep(tmp_path):
    return load_sweep("sweep/configs/quickstart.yaml", {"storage_path": str(tmp_path), "name": "s"})


def recorder_of(sweep, uri: str, experiment: str, notes: list[str], launch: int = 0) -> Recorder:
    parent = Tracker(uri, experiment, "s")
    return Recorder(sweep, launch, Place("s", uri, experiment, parent.run_id), notes.append)


def trains(recorder: Recorder, sweep, rate: float, stage: str = "warm_up") -> str:
    """Two steps of a trial, during which its process dies once; returns its name."""
    name = trial_id_of(sweep.trial_config({RATE: rate}))
    folder = sweep.folder / "trials" / name
    write_json(folder / "evaluation.json", {"tags": {"accuracy": "non-private"}})
    for steps in ((2,), (2, 4)):
        recorder.started(f"tune {rate}", {RATE: rate})
        for step in steps:
            report = {"stage": stage, "step": step, "loss": 1 / step, "system/cpu": 0.5}
            recorder.reported(f"tune {rate}", {**report, "trial": name})
    (folder / "metrics.jsonl").write_text("")
    return name


def test_the_driver_records_how_each_trial_went(tmp_path, uri, sweep):
    experiment, notes = open_experiment(uri, "recorder", tmp_path), []
    recorder = recorder_of(sweep, uri, experiment, notes)
    ends = (
        DONE,
        {**DONE, "failure": "out of luck", "stage": "x"},
        {},
        {"stage": "warm_up", "step": 4},
        None,
    )
    names = []
    for number, last in enumerate(ends, start=1):
        names.append(trains(recorder, sweep, rate := number / 1000))
        recorder.reported(f"tune {rate}", last or {"stage": "evaluation", "step": 4})
        if last is not None:
            recorder.ended(f"tune {rate}", last)
    recorder.close(5.0)  # Cuts the last one off.
    assert notes == []
    client = MlflowClient(tracking_uri=uri)
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert [runs[name].info.status for name in names] == [
        *("FINISHED", "FAILED", "KILLED", "KILLED", "KILLED")
    ]
    for number, name in enumerate(names, start=1):
        run = runs[name]
        assert run.data.params[RATE] == str(number / 1000)
        assert run.data.metrics["system/cpu"] == 0.5
        points = client.get_metric_history(run.info.run_id, "warm_up/loss")
        assert [(point.step, point.value) for point in points] == [(2, 1 / 2), (4, 1 / 4)]
        assert ("accuracy" in run.data.metrics) == (number == 1)
    assert runs[names[0]].data.tags["privacy.accuracy"] == "non-private"


def test_what_mlflow_refuses_is_told_at_once_and_raised_at_the_end(tmp_path, uri, sweep):
    experiment, notes = open_experiment(uri, "refused", tmp_path), []
    recorder = recorder_of(sweep, uri, experiment, notes)
    refused = trains(recorder, sweep, 0.001, stage="a name with\nbreaks")
    fine, no_result = (trains(recorder, sweep, rate) for rate in (0.002, 0.003))
    recorder.ended("tune 0.002", DONE)
    (sweep.folder / "trials" / no_result / "evaluation.json").unlink()
    recorder.ended("tune 0.003", DONE)
    with pytest.raises(MlflowException, match="Invalid"):
        recorder.close(5.0)
    (note,) = notes
    assert f"trial {refused} is not recorded whole: MlflowException: " in note
    runs = {
        run.info.run_name: run for run in MlflowClient(tracking_uri=uri).search_runs(experiment)
    }
    assert runs[fine].info.status == "FINISHED"
    assert runs[refused].info.status == runs[no_result].info.status == "KILLED"


def test_a_trial_whose_process_died_before_it_started_is_recorded_as_failed(tmp_path, uri, sweep):
    experiment = open_experiment(uri, "unborn", tmp_path)
    recorder = recorder_of(sweep, uri, experiment, [])
    trial = SimpleNamespace(trial_id="tune", config={RATE: 0.001})
    recorder.callback().on_trial_error(1, [trial], trial)
    recorder.close(5.0)
    runs = MlflowClient(tracking_uri=uri).search_runs([experiment])
    assert sorted(run.info.status for run in runs) == ["FAILED", "RUNNING"]


def test_a_slow_server_holds_up_the_end_only_so_long(tmp_path, uri, sweep, monkeypatch):
    experiment = open_experiment(uri, "slow", tmp_path)
    recorder = recorder_of(sweep, uri, experiment, [])
    trains(recorder, sweep, 0.001)

    def slow(self: Tracker, step: int, metrics: dict) -> None:
        time.sleep(0.1)

    monkeypatch.setattr(Tracker, "log_step", slow)
    monkeypatch.setattr("sweep.tracking.recorder._LONGEST_CLOSE", 0.3)
    for step in range(10, 500):
        recorder.reported("tune 0.001", {"stage": "warm_up", "step": step})
    began = time.monotonic()
    recorder.close(0.0)
    assert time.monotonic() - began < 25  # Sent, it would take 49 seconds.
    (outbox,) = sweep.folder.glob("trials/*/mlflow_outbox.jsonl")
    *steps, end = outbox.read_text().splitlines()
    name, (step, _) = json.loads(steps[-1])
    assert (name, step) == ("log_step", 499)
    assert json.loads(end) == ["finish", ["KILLED"]]


def test_a_line_that_cannot_be_sent_hinders_no_other(tmp_path, uri):
    experiment = open_experiment(uri, "lines", tmp_path)
    lines = (["log_missing_steps", [{"path": f"{tmp_path}/gone"}]], ["finish", ["FINISHED"]])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / OUTBOX).write_text(f"{{torn\n{text}")
    box = Outbox(tmp_path, uri, experiment, "s/t")
    assert box.flush(5.0)
    (run,) = MlflowClient(tracking_uri=uri).search_runs([experiment])
    assert run.info.status == "FINISHED"


def test_an_older_driver_records_nothing(tmp_path, uri, sweep):
    experiment = open_experiment(uri, "older", tmp_path)
    recorder = recorder_of(sweep, uri, experiment, [], launch=7)
    sweep.folder.mkdir(exist_ok=True)
    (sweep.folder / "launch").write_text("8")
    trains(recorder, sweep, 0.001)
    recorder.ended("tune 0.001", DONE)
    recorder.close(0.0)
    (parent,) = MlflowClient(tracking_uri=uri).search_runs([experiment])
    assert parent.info.run_name == "s"


def test_the_users_server_is_honoured(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    assert tracking_uri(tmp_path) == "http://tracking.example:5000"
    assert ui_command("http://tracking.example:5000") == "open http://tracking.example:5000"


def test_pictures_are_logged_once(tmp_path, uri):
    experiment = open_experiment(uri, "pictures", tmp_path)
    Image.new("L", (12, 12)).save(tmp_path / "grid.png")
    for _ in range(2):  # The second as after a restart.
        tracker = Tracker(uri, experiment, "s/t")
        for key, step in (("samples", 3), ("samples", 30), ("central_images", 0), ("samples", 3)):
            tracker.log_picture(key, step, tmp_path / "grid.png")
    client = MlflowClient(tracking_uri=uri)
    names = [a.path.split("/")[1] for a in client.list_artifacts(tracker.run_id, "images")]
    found = sorted(name.split("+timestamp")[0] for name in names if name.endswith(".png"))
    assert found == ["central_images+step+0", "samples+step+3", "samples+step+30"]
    assert client.get_run(tracker.run_id).data.tags["mlflow.loggedImages"] == "True"


def test_the_data_set_is_named_by_public_facts(tmp_path, uri):
    facts = {"num_examples": 1437, "num_classes": 10}
    tracker = Tracker(uri, open_experiment(uri, "facts", tmp_path), "s/t")
    for _ in range(2):
        tracker.log_dataset("digits", facts)
    (logged,) = MlflowClient(tracking_uri=uri).get_run(tracker.run_id).inputs.dataset_inputs
    assert logged.dataset.name == "digits"
    assert json.loads(logged.dataset.source) == facts
    assert json.loads(logged.dataset.profile) == {"num_rows": 1437}


def test_charts_are_saved_as_the_page_saves_them(tmp_path, uri):
    experiment = open_experiment(uri, "charts", tmp_path)
    Tracker(uri, experiment, "s").log_charts("s", '{"orderByAsc": true}')
    tags = MlflowClient(tracking_uri=uri).get_experiment(experiment).tags
    kind, _, content = tags["mlflow.sharedViewState.s"].partition(";")
    assert kind == "deflate"
    assert json.loads(zlib.decompress(base64.b64decode(content))) == {"orderByAsc": True}


def test_how_to_compare_says_what_it_can(tmp_path, uri):
    absent = f"sqlite:///{tmp_path}/absent.db"
    assert how_to_compare(absent, "e", "s") == ui_command(absent)
    assert not (tmp_path / "absent.db").exists()
    assert how_to_compare(uri, "no experiment", "s") == ui_command(uri)
    experiment = open_experiment(uri, "e", tmp_path)
    for key in ("s", "s2/t"):
        Tracker(uri, experiment, key)
    assert how_to_compare(uri, "e", "s") == ui_command(uri)
    trial = Tracker(uri, experiment, "s/t")
    assert len(how_to_compare(uri, "e", "s").splitlines()) == 2  # It has no figures yet.
    trial.finish("FINISHED")
    _, charts, table = how_to_compare(uri, "e", "s").splitlines()
    assert charts.endswith(
        f"/#/experiments/{experiment}/runs?compareRunsMode=CHART&viewStateShareKey=s"
    )
    assert table.endswith(
        f"/#/compare-runs?runs=%5B%22{trial.run_id}%22%5D&experiments=%5B%22{experiment}%22%5D"
    )


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:word@127.0.0.1:9",
        "http://me:a@word@127.0.0.1:9",
        "postgresql://me:word@host/db",
    ],
)
def test_a_password_is_never_shown(uri):
    assert "word" not in ui_command(uri)
    if uri.startswith("http"):
        text = how_to_compare(uri, "e", "s")
        assert "word" not in text
        assert "does not answer" in text


def test_a_loss_that_is_not_finite_arrives_as_it_was(tmp_path, uri, monkeypatch):
    """It is kept as a text, as JSON has no such number; also where MLflow was away."""
    experiment = open_experiment(uri, "not finite", tmp_path)
    box = Outbox(tmp_path, uri, experiment, "s/t")
    with monkeypatch.context() as away:
        away.setattr(Outbox, "_attempt", lambda *_: False)
        box.log_step(1, {"loss": math.nan})
    assert json.loads((tmp_path / OUTBOX).read_text())[1][1] == {"mapping": {"loss": "NaN"}}
    assert box.flush()
    report = {"step": 2, "stage": "private_training", "loss": math.inf}
    (tmp_path / "metrics.jsonl").write_text(f"{to_json(report)}\n")
    tracker = Tracker(uri, experiment, "s/t")
    tracker.log_missing_steps(tmp_path / "metrics.jsonl")
    found = MlflowClient(tracking_uri=uri).get_run(tracker.run_id).data.metrics
    assert math.isnan(found["loss"])
    assert found["private_training/loss"] > 1e300  # The data base holds its largest number.
