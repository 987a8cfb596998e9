"""ASHA and a limit in a whole sweep: poor trials end themselves, pay for what ran, stay ended."""

import json
import re
import subprocess

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


def finish(process: subprocess.Popen, code: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=900)
    assert process.returncode == code, err
    assert "Traceback" not in out + err
    return out, err


@pytest.fixture(scope="module")
def stories(tmp_path_factory, joined):
    """The sweep meets its limit in the first trial, goes on with a larger one, is asked again."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "sweep.yaml").write_text(sweep_text("tiny", HEAD, SPACE))
    told = [
        finish(start(folder, "--max-hours", "0.001", **joined), 3),
        finish(start(folder, "--max-hours", "5", **joined), 0),
        finish(start(folder, "--max-hours", "5", **joined), 0),
    ]
    return folder, told


def test_a_limit_ends_the_sweep_in_one_line_that_says_how_to_go_on(stories):
    folder, told = stories
    assert re.search(
        r"stopped: max_hours=0\.001 is reached: 0\.0\d+ device hours .* larger max_hours",
        told[0][1],
    )
    usage = json.loads((folder / "runs" / "tiny" / "usage.json").read_text())
    assert usage["device_seconds"] > 3.6, "the second start counts on top of the first"
    assert usage["device_seconds"] == pytest.approx(2 * usage["trial_seconds"])


def test_a_poor_trial_is_shown_as_stopped_everywhere(stories, capsys):
    folder, told = stories
    rows = load_rows(open_sweep(folder / "runs", "tiny"))
    assert [row.state for row in rows] == ["finished", "stopped"]
    stopped = rows[1]
    assert stopped.config.private_training.learning_rate == 50.0
    assert f"trial {stopped.trial} stopped at step 10: early_fid_cnn" in told[1][0]
    assert f"trial {stopped.trial} stopped early: early_fid_cnn" in told[1][1]
    assert stopped.epsilon < stopped.plan.epsilon
    assert main(["ls", "--json", "--storage", str(folder / "runs")]) == 0
    (overview,) = json.loads(capsys.readouterr().out)
    assert (overview["finished"], overview["stopped"]) == (1, 1)
    assert "Trials could also be stopped early by their scores" in told[1][0]
    assert "(early_fid_cnn: non-private)" in told[1][0]
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


def test_a_stopped_trial_paid_for_the_steps_that_it_ran(stories):
    folder, _ = stories
    (path,) = (folder / "runs" / "ledger").glob("*.jsonl")
    executed = [entry["executed_steps"] for entry in Ledger.at(path).summary()["entries"]]
    rows = load_rows(open_sweep(folder / "runs", "tiny"))
    expected = [row.config.private_steps - (10 if row.state == "stopped" else 0) for row in rows]
    assert sorted(executed) == sorted(expected)


def test_the_study_knows_the_last_early_score_and_nothing_is_tried_again(stories):
    folder, told = stories
    assert "trial " not in told[2][1], "all had ended before"
    study = optuna.load_study(study_name="tiny", storage=open_storage(folder / "runs" / "tiny"))
    values = [t.value for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    rows = load_rows(open_sweep(folder / "runs", "tiny"))
    told_values = [row.early_score or row.scores["fid_cnn"] for row in rows]
    assert values == pytest.approx(told_values)
