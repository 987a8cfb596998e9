"""MLflow's records: found again rather than made twice, each step once, statuses true."""

import base64
import json
import math
import threading
import time
import zlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from test_report_parts import row as trial
from test_sweep_config import SELECTION

from core.config import short_digest
from core.io.files import to_json, write_json
from core.record.folder import RunFolder
from sweep.config.sweep import load_sweep
from sweep.driver.observers import Relay
from sweep.results.replicates import FIGURES
from sweep.tracking import mirror
from sweep.tracking.charts import points
from sweep.tracking.client import (
    Tracker,
    how_to_compare,
    kill_stale,
    open_experiment,
    tracking_uri,
    ui_command,
)
from sweep.tracking.content import tell_settings
from sweep.tracking.mirror import Mirror, lacking


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

    def points(*steps: int) -> list[tuple[str, int, float]]:
        return [("loss", step, 1.0 / step) for step in steps]

    first = Tracker(uri, experiment, "s/t1", parent.run_id)
    first.log_params({f"k{i}": i for i in range(150)})
    first.log_points(points(*range(10, 20_000, 10)))
    kill_stale(uri, "again", parent.run_id, "s")
    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(first.run_id).info.status == "KILLED"
    assert client.get_run(parent.run_id).info.status == "RUNNING"

    again = Tracker(uri, experiment, "s/t1", parent.run_id)
    assert again.run_id == first.run_id
    for _ in range(2):
        again.log_params({"k0": 0, "new": 1})
        again.log_points(points(5, 10, 15, 20, 15, 20_000))
    again.log_file(picture, "synthetic")
    again.log_file(tmp_path / "absent.png")
    again.finish("FINISHED")

    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == 151
    steps = [m.step for m in client.get_metric_history(first.run_id, "loss")]
    assert sorted(steps) == sorted({*range(10, 20_001, 10), 5, 15})
    assert [a.path for a in client.list_artifacts(first.run_id, "synthetic")] == [
        "synthetic/grid.png"
    ]
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    children = client.search_runs(
        [experiment], filter_string=f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    )
    assert len(children) == 1


def test_a_figure_is_logged_again_only_where_it_has_changed(tmp_path, uri):
    tracker = Tracker(uri, open_experiment(uri, "figures", tmp_path), "s")
    for accuracy in (0.5, 0.5, 0.6):
        tracker.log_figures({"accuracy": accuracy, "fid": 3.0})
    client = MlflowClient(tracking_uri=uri)
    for name, values in (("accuracy", [0.5, 0.6]), ("fid", [3.0])):
        assert [m.value for m in client.get_metric_history(tracker.run_id, name)] == values


RATE = "private_training.learning_rate"
DONE = {
    "stage": "done", "step": 4, "accuracy": 0.7, "epsilon": 1.0, "noise_multiplier": 2.0,
    "seconds": 3.0, "tags": {"accuracy": "non-private"},
}  # fmt: skip
USE = {"system/cpu": 0.5}


@pytest.fixture
def sweep(tmp_path, request, monkeypatch):
    """One of an experiment of its own, which MLflow is told of at once."""
    monkeypatch.setattr(mirror, "_INTERVAL", 0.05)
    keys = {"storage_path": str(tmp_path), "name": "s", "experiment": request.node.name}
    sweep = load_sweep("tests/data/sweep.yaml", keys)
    sweep.folder.mkdir()
    write_json(sweep.folder / "sweep.json", {})
    return sweep


@pytest.fixture
def begin(sweep, uri):
    """Begins a mirror; in the end none is left running."""
    begun: list[Mirror] = []

    def begin(*rows: SimpleNamespace, launch: int = 0) -> Mirror:
        begun.append(Mirror(sweep, launch, uri, 5))
        begun[-1].begin(rows)
        return begun[-1]

    yield begin
    for each in begun:
        each.close(0.0, "KILLED")


def reports(sweep, rate: float, *steps: int, stage: str = "warm_up") -> str:
    """What a trial writes; returns its name."""
    name = short_digest(sweep.trial_config({RATE: rate}))
    folder = sweep.folder / "trials" / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"stage": stage, "step": step, "loss": 1 / step, **USE} for step in steps]
    (folder / "metrics.jsonl").write_text("".join(to_json(line) + "\n" for line in lines))
    return name


def runs_of(sweep, uri: str) -> dict[str, Any]:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(sweep.experiment)
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    return {run.info.run_name: run for run in found}


def steps_of(run, uri: str, name: str = "warm_up/loss") -> list[int]:
    history = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, name)
    return sorted(point.step for point in history)


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_driver_mirrors_how_each_trial_went(sweep, uri, begin):
    """Its process dies once: what it had reported and reports again is told once."""
    told = begin()
    ends = (DONE, {"failure": "out of luck"}, {}, {"stage": "warm_up", "step": 4}, None)
    names = []
    for number, last in enumerate(ends, start=1):
        names.append(reports(sweep, rate := number / 1000, 2, 3))
        told.started(names[-1], {RATE: rate})
        if number == 1:
            wait_for(lambda: names[0] in runs_of(sweep, uri))
            wait_for(lambda: steps_of(runs_of(sweep, uri)[names[0]], uri) == [2, 3])
            told.died(names[0])
            reports(sweep, rate, 2)
            told.started(names[0], {RATE: rate})
        reports(sweep, rate, 2, 3, 4)
        if last is not None:
            if "epsilon" in last:
                write_json(sweep.folder / "trials" / names[-1] / "evaluation.json", last)
            told.ended(names[-1], last)
    assert told.close(5.0, "FINISHED") == 0  # Cuts the last one off.
    runs = runs_of(sweep, uri)
    assert [runs[name].info.status for name in (*names, "s")] == [
        *("FINISHED", "FAILED", "KILLED", "KILLED", "KILLED", "FINISHED")
    ]
    for number, name in enumerate(names, start=1):
        run = runs[name]
        assert run.data.params[RATE] == str(number / 1000)
        assert run.data.metrics["system/cpu"] == 0.5
        assert steps_of(run, uri) == steps_of(run, uri, "step") == [2, 3, 4]
        assert ("accuracy" in run.data.metrics) == (number == 1)
        assert run.data.tags["mlflow.parentRunId"] == runs["s"].info.run_id
    assert runs[names[0]].data.tags["privacy.accuracy"] == "non-private"


def test_a_sweep_that_goes_on_takes_back_what_its_end_claimed(sweep, uri, begin):
    claimed = {"epsilon": 1.0, "epsilon_released": 2.0, "accuracy": 0.7}
    assert begin().close(5.0, "KILLED") == 0
    assert "epsilon_released" not in runs_of(sweep, uri)["s"].data.metrics
    place = MlflowClient(tracking_uri=uri).get_experiment_by_name(sweep.experiment)
    Tracker(uri, place.experiment_id, "s").log_figures(claimed)
    for _ in range(2):
        assert begin().close(5.0, "KILLED") == 0
    run = runs_of(sweep, uri)["s"]
    assert math.isnan(run.data.metrics["epsilon"])
    assert math.isnan(run.data.metrics["epsilon_released"])
    assert run.data.metrics["accuracy"] == 0.7
    history = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, "epsilon")
    assert len(history) == 2, "taken back once"
    assert "nothing is claimed" in run.data.tags["privacy.statement"]


def test_what_a_killed_driver_had_not_told_is_told_by_the_next(sweep, uri, begin):
    """Machine use, too; and nothing twice."""
    name = reports(sweep, 0.001, 2, 4)
    config = sweep.trial_config({RATE: 0.001})
    row = SimpleNamespace(trial=name, config=config, state="unfinished")
    row.run_dir = sweep.folder / "trials" / name
    assert lacking(sweep, [row], uri) == ([row], True)
    begin(row).close(5.0, "KILLED")
    assert lacking(sweep, [row], uri) == ([], True)
    reports(sweep, 0.001, 2, 4, 6)
    assert lacking(sweep, [row], uri) == ([row], True)
    begin(row).close(5.0, "KILLED")
    run = runs_of(sweep, uri)[name]
    assert run.info.status == "KILLED"
    assert steps_of(run, uri) == steps_of(run, uri, "system/cpu") == [2, 4, 6]
    write_json(row.run_dir / "evaluation.json", DONE)
    row.state = "finished"
    assert lacking(sweep, [row], uri) == ([row], True)
    assert begin(row).close(5.0, "FINISHED") == 0
    assert lacking(sweep, [row], uri) == ([], False)
    assert steps_of(runs_of(sweep, uri)[name], uri) == [2, 4, 6]


def test_a_refusal_is_told_once_and_hinders_no_other_trial(sweep, uri, begin, capsys):
    told = begin()
    refused = [reports(sweep, rate, 2, stage="a name with\nbreaks") for rate in (0.001, 0.002)]
    fine, no_result = (reports(sweep, rate, 2) for rate in (0.003, 0.004))
    write_json(sweep.folder / "trials" / fine / "evaluation.json", DONE)
    for number, name in enumerate((*refused, fine, no_result), start=1):
        told.started(name, {RATE: number / 1000})
    wait_for(lambda: len(runs_of(sweep, uri)) == 5)
    for name in (*refused, fine, no_result):
        told.ended(name, DONE)
    assert told.close(5.0, "FINISHED") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: MLflow has not recorded all of s/{refused[0]} (MlflowExc")
    assert line.endswith("the sweep's folder holds it, and the same command tries again")
    runs = runs_of(sweep, uri)
    assert [runs[name].info.status for name in (fine, no_result, *refused)] == [
        *("FINISHED", "KILLED", "KILLED", "KILLED")
    ]


def test_a_trial_whose_process_died_before_it_started_is_recorded_as_failed(sweep, uri, begin):
    told = begin()
    trial = SimpleNamespace(trial_id="tune", config={RATE: 0.001})
    Relay(sweep, [told]).on_trial_error(1, [trial], trial)
    assert told.close(5.0, "KILLED") == 0
    assert sorted(run.info.status for run in runs_of(sweep, uri).values()) == ["FAILED", "KILLED"]


def test_a_slow_server_holds_up_the_end_only_so_long(sweep, uri, begin, monkeypatch):
    told = begin()
    name = reports(sweep, 0.001, 2)
    gate = threading.Event()
    monkeypatch.setattr(Tracker, "log_points", lambda *_: gate.wait())
    monkeypatch.setattr(mirror, "_LONGEST_CLOSE", 0.3)
    told.started(name, {RATE: 0.001})
    began = time.monotonic()
    assert told.close(0.0, "FINISHED") == 2
    assert told.trouble == "it took longer than 0 s"
    assert time.monotonic() - began < 10
    gate.set()


def test_one_that_is_slow_and_then_fails_once_is_asked_again(sweep, uri, begin, monkeypatch):
    """As a data base in a file under load: its time is not that of one that is away."""
    told, patience, failures = begin(), 0.5, [OSError("database is locked")]
    name, log_points = reports(sweep, 0.001, 2), Tracker.log_points
    told.started(name, {RATE: 0.001})

    def slow(tracker: Tracker, points: Any) -> None:
        ours = threading.current_thread() is told._thread  # Not that of an earlier test.
        if ours and told._closing.wait() and failures:
            time.sleep(2 * patience)
            raise failures.pop()
        log_points(tracker, points)

    monkeypatch.setattr(Tracker, "log_points", slow)
    assert told.close(patience, "FINISHED") == 0
    assert told.trouble == "OSError: database is locked"
    assert steps_of(runs_of(sweep, uri)[name], uri) == [2]


def test_what_was_reported_since_the_last_look_is_one_call(sweep, uri, begin, monkeypatch):
    sizes, log_batch = list[int](), MlflowClient.log_batch

    def counted(client: MlflowClient, run_id: str, **given: Any) -> Any:
        ours = threading.current_thread() is told._thread  # Not that of an earlier test.
        sizes.extend([len(given["metrics"])] if ours and given.get("metrics") else [])
        return log_batch(client, run_id, **given)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    told, name = begin(), reports(sweep, 0.001, *range(1, 301))
    told.started(name, {RATE: 0.001})
    assert told.close(5.0, "FINISHED") == 0
    assert sizes == [3 * 300]


def test_an_older_driver_tells_nothing(sweep, uri, begin):
    (sweep.folder / "launch").write_text("8")
    told = begin(launch=7)
    told.started(reports(sweep, 0.001, 2), {RATE: 0.001})
    told.close(0.0, "KILLED")
    assert runs_of(sweep, uri) == {}


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
    experiment = open_experiment(uri, "facts", tmp_path)
    tracker = Tracker(uri, experiment, "s/t")
    for _ in range(2):
        Tracker(uri, experiment, "s/t").log_dataset("digits", facts)
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


def test_numbers_that_are_not_finite_arrive_as_they_were(tmp_path, uri):
    """They are kept as texts, as JSON has no such numbers."""
    reported = [{"step": n, "stage": "x", "loss": v} for n, v in enumerate((math.nan, math.inf))]
    torn = '{"step": 3, "sta'
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(to_json, reported), torn]))
    tracker = Tracker(uri, open_experiment(uri, "not finite", tmp_path), "s/t")
    tracker.log_points(points(RunFolder(tmp_path).reports()))
    history = MlflowClient(tracking_uri=uri).get_metric_history(tracker.run_id, "x/loss")
    first, second = (point.value for point in sorted(history, key=lambda point: point.step))
    assert math.isnan(first)
    assert second > 1e300  # The data base holds its largest number.


def test_the_parent_of_a_sweep_holds_the_intervals_of_its_settings(tmp_path, uri):
    """Under names that people's own queries may use; of a selection nothing, as it tells of all."""
    experiment = open_experiment(uri, "settings", tmp_path)
    replicated = [
        trial("lucky", 0.9, 9, stage_split=0.3),
        trial("other", 0.6, 9, stage_split=0.3, seed=1),
        trial("good", 0.85, 9, stage_split=0.6),
        trial("again", 0.86, 9, stage_split=0.6, seed=1),
    ]
    search = load_sweep("tests/data/sweep.yaml", {"replicates": 2})
    secret = SELECTION | {"objective.metric": "dp_accuracy"}
    selection = load_sweep("tests/data/sweep.yaml", secret)
    told = [
        (search, replicated, {"recommended_trial", "setting_means"}),
        (search, replicated[1:3], set[str]()),
        (selection, [replace(row, scores=row.scores | {"dp_accuracy": 0.5}) for row in replicated],
         set[str]()),
    ]  # fmt: skip
    for number, (sweep, rows, tags) in enumerate(told):
        tracker = Tracker(uri, experiment, f"settings{number}")
        before = set(MlflowClient(tracking_uri=uri).get_run(tracker.run_id).data.tags)
        tell_settings(tracker, sweep, rows)
        data = MlflowClient(tracking_uri=uri).get_run(tracker.run_id).data
        assert set(data.tags) - before == tags
        assert set(data.metrics) == ({*FIGURES, "score_noise"} if tags else set())
        if tags:
            assert data.tags["recommended_trial"] == "good"
            assert data.tags["setting_means"].startswith("good: 0.855 +- 0.4")
            assert data.metrics["setting_trials"] == 2
