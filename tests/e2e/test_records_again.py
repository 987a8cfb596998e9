"""Records are not what a sweep fails for: what MLflow lost, or never got, is recorded again."""

import shutil

from mlflow.tracking import MlflowClient

from sweep.launch import run_sweep
from sweep.results import load_rows
from sweep.stored import open_sweep
from sweep.tracking import recorded, tracking_uri


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
    curves = finished[0].run_dir / "metrics.jsonl"
    curves.rename(curves.with_name("away"))

    monkeypatch.chdir(tmp_path)  # A sweep changes it.
    first = run_sweep(sweep)
    assert first.complete
    assert len(first.rows) == 3
    told = capsys.readouterr().err
    assert "warning: MLflow has not recorded all (FileNotFoundError" in told
    assert "the same command tries again" in told
    client = MlflowClient(tracking_uri=uri)
    (experiment,) = client.search_experiments(filter_string="name = 'feta-sweep'")
    trials = {f"small/{row.trial}" for row in first.rows if row.state == "finished"}
    assert not trials <= recorded(uri, experiment.experiment_id, "small")

    curves.with_name("away").rename(curves)
    assert run_sweep(sweep).complete
    assert capsys.readouterr().err == ""
    assert recorded(uri, experiment.experiment_id, "small") == {"small", *trials}
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
