"""ASHA in a whole sweep: poor trials end themselves and pay for what ran."""

import json

import optuna
import pytest
from mlflow.tracking import MlflowClient
from test_sweep import start
from tiny_sweep import sweep_text

from core.privacy.ledger import Ledger
from sweep.__main__ import main
from sweep.results import load_rows
from sweep.stored import open_sweep
from sweep.study import open_storage

HEAD = """num_trials: 2
workers_per_trial: 1
cpus_per_worker: 2
search_seed: 6
sampler: random
scheduler: asha
asha:
  grace_fraction: 0.5
objective:
  metric: fid_cnn"""
# The first point draws the small rate, and so images; the second the large, and so noise.
SPACE = """  private_training.learning_rate:
    choices: [1e-3, 50.0]
  stage_split:
    low: 0.2
    high: 0.4
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory, joined):
    folder = tmp_path_factory.mktemp("early")
    (folder / "sweep.yaml").write_text(sweep_text("tiny", HEAD, SPACE))
    process = start(folder, **joined)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert "Traceback" not in out + err
    return folder, out, err


def test_a_poor_trial_is_shown_as_stopped_everywhere(swept, capsys):
    folder, out, err = swept
    rows = load_rows(open_sweep(folder / "runs", "tiny"))
    assert [row.state for row in rows] == ["finished", "stopped"]
    stopped = rows[1]
    assert stopped.config.private_training.learning_rate == 50.0
    assert f"trial {stopped.trial} stopped at step 10: early_fid_cnn" in out
    assert f"trial {stopped.trial} stopped early: early_fid_cnn" in err
    assert stopped.epsilon < stopped.plan.epsilon
    assert main(["ls", "--json", "--storage", str(folder / "runs")]) == 0
    (overview,) = json.loads(capsys.readouterr().out)
    assert (overview["finished"], overview["stopped"]) == (1, 1)
    assert "Trials could also be stopped early by their scores" in out
    assert "(early_fid_cnn: non-private)" in out
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("feta-sweep")
    for row in rows:
        (run,) = client.search_runs(
            [experiment.experiment_id], f"tags.`sweep.key` = 'tiny/{row.trial}'"
        )
        assert run.data.tags["sweep.state"] == row.state
        assert run.info.status == ("KILLED" if row.state == "stopped" else "FINISHED")
        assert run.data.tags["privacy.early_fid_cnn"] == "non-private"
        history = client.get_metric_history(run.info.run_id, "early_fid_cnn")
        assert {metric.step for metric in history} == {10}


def test_a_stopped_trial_paid_for_the_steps_that_it_ran(swept):
    folder, *_ = swept
    (path,) = (folder / "runs" / "ledger").glob("*.jsonl")
    executed = [entry["executed_steps"] for entry in Ledger.at(path).summary()["entries"]]
    rows = load_rows(open_sweep(folder / "runs", "tiny"))
    expected = [row.config.private_steps - (10 if row.state == "stopped" else 0) for row in rows]
    assert sorted(executed) == sorted(expected)


def test_the_study_knows_the_last_early_score(swept):
    folder, *_ = swept
    study = optuna.load_study(study_name="tiny", storage=open_storage(folder / "runs" / "tiny"))
    values = [t.value for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    rows = load_rows(open_sweep(folder / "runs", "tiny"))
    told_values = [row.early_score or row.scores["fid_cnn"] for row in rows]
    assert values == pytest.approx(told_values)
