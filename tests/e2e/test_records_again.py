"""Records are not what a sweep fails for: what MLflow lost, or never got, is recorded again."""

import re
import shutil

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.tracking import MlflowClient

from sweep.driver.launch import run_sweep
from sweep.results.find import open_sweep
from sweep.results.table import load_rows
from sweep.tracking.client import Tracker, known_runs, status_of, tracking_uri


def test_a_complete_sweep_that_mlflow_does_not_know_is_recorded(
    storage, tmp_path, monkeypatch, capsys
):
    """Its data base was lost, or its runs and experiment removed for good."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs = shutil.copytree(storage, tmp_path / "runs")
    sweep = open_sweep(runs, "small").model_copy(update={"num_trials": 2})
    finished = [row for row in load_rows(sweep) if row.state == "finished"]
    for row in finished[2:]:
        shutil.rmtree(row.run_dir)
    uri = tracking_uri(runs)

    def refuse(*_):
        raise MlflowException("not here", error_code=INVALID_PARAMETER_VALUE)

    monkeypatch.chdir(tmp_path)  # A sweep changes it.
    with monkeypatch.context() as refusing:
        refusing.setattr(Tracker, "log_points", refuse)
        refusing.setattr(Tracker, "log_figures", refuse)
        first = run_sweep(sweep)
    assert first.complete
    assert len(first.rows) == 3
    told = capsys.readouterr().err
    # Of all trials and the summary; the card does not depend on it.
    first_line, last_line = told.splitlines()
    assert first_line.startswith("warning: MLflow has not recorded all of small/")
    assert "(MlflowException: not here): the sweep's folder holds it" in first_line
    assert re.search(
        r"lacks something of 4 runs \(MlflowException: not here\): .* the same command tells it$",
        last_line,
    )
    assert (sweep.folder / "privacy_card.md").exists()
    client = MlflowClient(tracking_uri=uri)
    (experiment,) = client.search_experiments(filter_string="name = 'feta-sweep'")

    def ended() -> set[str]:
        known = known_runs(uri, "feta-sweep", "small")
        return {key for key, run in known.items() if status_of(run) == "FINISHED"}

    trials = {f"small/{row.trial}" for row in first.rows if row.state == "finished"}
    assert ended() == set()

    assert run_sweep(sweep).complete
    assert capsys.readouterr().err == ""
    assert ended() == {"small", *trials}
    (version,) = client.search_model_versions("name = 'small'")

    def runs_of() -> set[str]:
        return {run.info.run_id for run in client.search_runs([experiment.experiment_id])}

    for run_id in (before := runs_of()):
        client.delete_run(run_id)
    assert run_sweep(sweep).complete
    assert capsys.readouterr().err == ""
    assert not runs_of(), "what its owner deleted stays deleted"
    client.restore_run(version.run_id)
    assert runs_of() < before
