"""Several objectives in a whole sweep through Tune, Optuna and MLflow; its trials are stand-ins."""

import json
from pathlib import Path

import optuna
import pytest
from mlflow.tracking import MlflowClient
from stand_in import drive
from tiny_sweep import ROOT

from sweep.__main__ import main
from sweep.search.study import open_storage

TRIALS = 5
SWEEP = f"""
name: two
base: {ROOT}/core/configs/digits.yaml
num_trials: {TRIALS}
num_startup_trials: 2
workers_per_trial: 1
max_concurrent_trials: 1
sampler: nsga2
objective: [fid_cnn, accuracy]
fixed:
  stage_split: 0.0
  privacy.target_epsilon: 1.0
  training.num_steps: 4
search_space:
  private_training.learning_rate:
    low: 1e-3
    high: 1e-1
    log: true
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory, joined) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("two")
    return folder, drive(folder, SWEEP, joined)[0]


def test_the_table_marks_the_front_and_the_study_has_both_scores(swept):
    folder, out = swept
    assert "Pareto front by fid_cnn and accuracy (* in the table):" in out
    assert out.count(" *") == TRIALS, "each trial is better than any other in one of the two"
    assert "best trial" not in out
    assert "by composition" in out
    study = optuna.load_study(study_name="two", storage=open_storage(folder / "runs" / "two"))
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert len(done) == len(study.best_trials) == TRIALS
    selected = list((folder / "runs" / "two" / "trials").glob("*/selected.json"))
    assert len(selected) == TRIALS, "any of the front may be released"
    assert "fid_cnn (non-private) and accuracy (non-private)" in selected[0].read_text()


def test_mlflow_names_the_front(swept):
    folder, _ = swept
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("feta-sweep")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`sweep.key` = 'two'")
    assert parent.info.status == "FINISHED"
    assert len(parent.data.tags["best_trial"].split(", ")) == TRIALS
    assert parent.data.params["objective"] == "fid_cnn, accuracy"


def test_best_asks_which_metric_counts(swept, capsys, tmp_path):
    folder, _ = swept
    where = ["--storage", str(folder / "runs")]
    assert main(["best", "two", *where]) == 0
    out = capsys.readouterr().out
    assert "the Pareto front: choose the best by one with --by fid_cnn or --by accuracy" in out
    assert not (folder / "runs" / "two" / "best.yaml").exists()
    found = {}
    for metric in ("fid_cnn", "accuracy"):
        path = tmp_path / metric
        assert main(["best", "two", "--by", metric, "--json", "--out", str(path), *where]) == 0
        found[metric] = json.loads(capsys.readouterr().out)
        assert path.exists()
    assert found["fid_cnn"]["fid_cnn"] < found["accuracy"]["fid_cnn"]
    assert found["fid_cnn"]["accuracy"] < found["accuracy"]["accuracy"]
    assert main(["best", "two", "--by", "seconds", *where]) == 2
    assert "--by=seconds must be an objective: fid_cnn, accuracy" in capsys.readouterr().err
    assert main(["ls", "--json", *where]) == 0
    (overview,) = json.loads(capsys.readouterr().out)
    assert len(overview["best_trials"]) == TRIALS


def test_the_report_says_that_a_front_was_sought(swept, tmp_path):
    folder, _ = swept
    page = tmp_path / "report.html"
    where = ["--storage", str(folder / "runs"), "--out", str(page)]
    assert main(["report", "--name", "two", *where]) == 0
    text = page.read_text()
    assert "The search sought the Pareto front of fid_cnn and accuracy" in text
    assert "* marks the Pareto front" in text
