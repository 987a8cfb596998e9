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

SHARED = {
    "central_images.per_class", "dataset.name", "model.base_channels", "privacy.scope",
    "privacy.target_epsilon", "private_training.expected_batch_size",
    "private_training.learning_rate", "private_training.max_grad_norm",
    "private_training.noise_multiplicity", "sampler.num_steps", "seed", "training.num_steps",
}  # fmt: skip
SEARCHED = {
    "central_images.per_class", "central_images.noise_multiplier", "stage_split",
    "private_training.learning_rate", "dataset.name",
}  # fmt: skip
SCORES = {"accuracy", "fid_cnn", "kid_cnn", "precision_cnn", "recall_cnn"}
COSTS = {"epsilon_trial", "epsilon_central_share", "gpu_hours", "noise_multiplier", "seconds"}
STEPS = {
    "step", "private_training/loss", "private_training/seconds_per_step",
    "warm_up/loss", "warm_up/seconds_per_step",
}  # fmt: skip
TRIAL = {
    "params": SHARED | SEARCHED,
    "metrics": SCORES | COSTS | STEPS,
    "tags": {
        "mlflow.loggedImages", "mlflow.parentRunId", "mlflow.runName", "sweep.key", "sweep.state",
        "privacy.loss", "privacy.kid_cnn_stddev", *(f"privacy.{name}" for name in SCORES),
    },
}  # fmt: skip
PARENT = {
    "params": (SHARED - SEARCHED)
    | {"num_trials", "objective", *(f"search_space.{key}" for key in SEARCHED)},
    "metrics": SCORES
    | COSTS
    | (SEARCHED - {"dataset.name"})
    | {"epsilon", "epsilon_sweep", "epsilon_released"},
    "tags": {"best_trial", "mlflow.runName", "privacy.statement", "sweep.key"},
}


def keys_of(run) -> dict[str, set[str]]:
    return {kind: set(getattr(run.data, kind)) for kind in TRIAL}


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
    # What people's own queries and charts name stays as it is.
    recorded = {r.data.tags["sweep.key"]: r for r in client.search_runs([experiment.experiment_id])}
    split = {row.trial: row.config.stage_split for row in finished}
    for key in ("small", *trials):
        expected = TRIAL if "/" in key else PARENT
        if split.get(key.partition("/")[2]) == 0:
            expected = expected | {
                "metrics": {m for m in expected["metrics"] if m[:7] != "warm_up"}
            }
        assert keys_of(recorded[key]) == expected
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
