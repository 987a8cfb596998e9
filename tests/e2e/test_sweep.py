"""The whole product on one machine: Ray, two workers a trial, Optuna, MLflow, real digits.

Of three trials one is interrupted and goes on to its end; one, by ASHA, ends itself as poor and
pays for what ran; one is refused.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from leftovers import MARK, assert_none_left
from mlflow.tracking import MlflowClient
from tiny_sweep import ROOT, SPLIT, sweep_text

from core.privacy.keys import SECRET_FILE_VARIABLE
from core.privacy.ledger.ledger import Ledger
from sweep.__main__ import main
from sweep.results.find import open_sweep
from sweep.results.table import Row, load_rows
from sweep.search.study import open_storage

HEAD = """num_trials: 3
num_startup_trials: 10
search_seed: 33"""
ASHA = """
sampler: random
scheduler: asha
asha:
  grace_fraction: 0.5
objective:
  metric: fid_cnn"""
# First comes a point that cannot be paid, then one with the small rate, and so images, one with the
# large, and so noise, another that cannot be paid, and last one of a data set that is not there.
SPACE = f"""  central_images.per_class:
    low: 1
    high: 400
    log: true
  central_images.noise_multiplier:
    low: 2.0
    high: 20.0
    log: true
  private_training.learning_rate:
    choices: [1e-3, 2.0]
{SPLIT}  dataset.name:
    choices: [digits, idx]
"""
SWEEP = sweep_text("tiny", HEAD + ASHA, SPACE)


def start(folder: Path, *arguments: str, **settings: str) -> subprocess.Popen:
    environment = os.environ | {"COLUMNS": "160", MARK: str(folder)} | settings
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.Popen(
        [sys.executable, ROOT / "sweep" / "run.py", "--config", folder / "sweep.yaml", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.yaml").write_text(SWEEP)
    return folder


@pytest.fixture(scope="module")
def stories(folder, joined):
    """The sweep is interrupted in its first trial's training, continued on another cluster, and
    asked again.
    """
    first = start(folder)
    metrics = folder / "runs" / "tiny" / "trials"
    deadline = time.monotonic() + 240
    while not list(metrics.glob("*/checkpoints/last.pt")):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline, "the first trial did not reach a checkpoint"
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    told = [first.communicate(timeout=120)]
    codes = [first.returncode]
    for _ in range(2):
        process = start(folder, **joined)
        told.append(process.communicate(timeout=500))
        codes.append(process.returncode)
    return codes, told


def children(folder: Path) -> list:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("feta-sweep")
    return client.search_runs(
        [experiment.experiment_id], filter_string="tags.`sweep.key` LIKE 'tiny/%'"
    )


def test_interrupting_says_how_to_go_on(stories):
    codes, told = stories
    assert codes[0] == 130
    assert "the same command goes on where it stopped" in told[0][1]
    assert "Traceback" not in told[0][0] + told[0][1]


def test_a_failed_trial_is_shown_and_does_not_stop_the_others(folder, stories):
    codes, told = stories
    out = told[1][0]
    assert codes[1] == 1
    assert "dataset.name=idx needs a folder" in out
    assert "Traceback" not in out + told[1][1]
    (done,) = (folder / "runs" / "tiny" / "trials").glob("*/evaluation.json")
    assert f"best trial: {done.parent.name} (accuracy 0." in out


def test_unaffordable_points_cost_nothing(folder, stories):
    _, told = stories
    assert "pruned without compute" in told[0][1] + told[1][1]
    assert "the central images alone spend epsilon" in told[0][1] + told[1][1]
    assert re.search(r"[1-9]\d* points? pruned without compute", told[0][0] + told[1][0])


def test_table_states_scores_and_all_epsilons(folder, stories):
    out = stories[1][1][0]
    for column in ("trial", "count", "noise", "split", "DP-SGD noise", "eps trial", "eps sweep"):
        assert column in out
    guarantee = r"the end-to-end guarantee is not (0\.\d+|1) but [12]\.\d+ by composition"
    assert re.search(guarantee, out)
    for name in ("one trial", "all that was computed", "the release with its selection"):
        assert re.search(rf"epsilon of {name}: \d+", out)
    assert re.search(r"epsilon of all runs on this data set: \d+", out)
    assert "accuracy 0." in out
    assert ": non-private)" in out
    grid = Path(re.search(r"samples: (\S+)", out)[1])
    assert grid.read_bytes().startswith(b"\x89PNG")
    assert f"/mlflow ui --backend-store-uri sqlite:///{folder}/runs/mlflow.db" in out


def test_each_trial_is_two_workers_and_one_record(folder, stories):
    runs = children(folder)
    finished = [run for run in runs if run.info.status == "FINISHED"]
    failed = [run for run in runs if run.info.status == "FAILED"]
    folders = {path.name for path in (folder / "runs" / "tiny" / "trials").iterdir()}
    assert {run.info.run_name for run in runs} == folders
    assert len(runs) == len(folders) == 3
    assert len(finished) == len(failed) == 1
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    for run in finished:
        run_dir = folder / "runs" / "tiny" / "trials" / run.info.run_name
        assert json.loads((run_dir / "environment.json").read_text())["world_size"] == 2
        result = json.loads((run_dir / "evaluation.json").read_text())
        for name in ("accuracy", "fid_cnn", "noise_multiplier", "seconds"):
            assert run.data.metrics[name] == pytest.approx(result[name])
        assert run.data.metrics["epsilon_trial"] == pytest.approx(result["epsilon"])
        assert result["epsilon"] <= 1.0
        share = result["epsilon_central"] / result["epsilon"]
        assert run.data.metrics["epsilon_central_share"] == pytest.approx(share)
        assert run.data.metrics["gpu_hours"] == 0
        assert 0 <= run.data.metrics["system/cpu_utilization_percentage"] <= 100
        assert "central_images.per_class" in run.data.params
        assert len(run.data.params) <= 25
        assert [each.dataset.name for each in run.inputs.dataset_inputs] == ["digits"]
        artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
        assert artifacts >= {"config.yaml", "privacy.json", "synthetic", "central_images"}
        pictures = [a.path.split("/")[1] for a in client.list_artifacts(run.info.run_id, "images")]
        shown = {name.split("+timestamp")[0] for name in pictures}
        assert shown == {f"samples+step+{step}" for step in (4, 8, 12, 16, 20)} | {
            "central_images+step+0"
        }
        assert len(pictures) == 2 * len(shown)  # Each in full and as a preview, once.
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "step")]
        assert len(steps) == len(set(steps))  # One that was lost with its process is sent later.


@pytest.fixture(scope="module")
def rows(folder, stories) -> list[Row]:
    return load_rows(open_sweep(folder / "runs", "tiny"))


def test_a_poor_trial_is_shown_as_stopped_everywhere(folder, stories, rows, capsys):
    out, err = stories[1][1]
    (stopped,) = [row for row in rows if row.state == "stopped"]
    assert stopped.config.private_training.learning_rate == 2.0
    assert f"trial {stopped.trial} stopped at step 10: early_fid_cnn" in out
    assert f"trial {stopped.trial} stopped early: early_fid_cnn" in err
    assert stopped.epsilon < stopped.plan.epsilon
    assert main(["ls", "--json", "--storage", str(folder / "runs")]) == 0
    (overview,) = json.loads(capsys.readouterr().out)
    assert (overview["finished"], overview["stopped"]) == (1, 1)
    assert "Trials could also be stopped early by their scores" in out
    assert "(early_fid_cnn: non-private)" in out
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    of_rows = {run.info.run_name: run for run in children(folder)}
    for row in rows:
        run = of_rows[row.trial]
        if row.state == "failed":
            assert "early_fid_cnn" not in run.data.metrics
            continue
        assert run.data.tags["sweep.state"] == row.state
        assert run.info.status == ("KILLED" if row.state == "stopped" else "FINISHED")
        assert run.data.tags["privacy.early_fid_cnn"] == "non-private"
        history = client.get_metric_history(run.info.run_id, "early_fid_cnn")
        assert {metric.step for metric in history} == {10}


def test_a_stopped_trial_paid_for_the_steps_that_it_ran(folder, rows):
    (path,) = (folder / "runs" / "ledger").glob("*.jsonl")
    executed = [entry["executed_steps"] for entry in Ledger.at(path).summary()["entries"]]
    ended = [row for row in rows if row.state != "failed"]
    expected = [row.config.private_steps - (10 if row.state == "stopped" else 0) for row in ended]
    assert sorted(executed) == sorted(expected)


def test_the_study_knows_the_last_early_score(folder, rows):
    study = optuna.load_study(study_name="tiny", storage=open_storage(folder / "runs" / "tiny"))
    values = [t.value for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    ended = [row for row in rows if row.state != "failed"]
    told = [row.early_score if row.state == "stopped" else row.scores["fid_cnn"] for row in ended]
    assert sorted(values) == pytest.approx(sorted(told))


def test_the_interrupted_trial_went_on_from_its_checkpoint(folder, stories):
    """A fresh start would have logged step 1 of the warm-up a second time at a later time."""
    for metrics in (folder / "runs" / "tiny" / "trials").glob("*/metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        assert steps == sorted(steps)


def test_no_process_outlives_the_sweep_and_an_ended_trial_keeps_no_checkpoint(folder, stories):
    assert_none_left(str(folder))
    runs = folder / "runs"
    for result in (runs / "tiny" / "trials").glob("*/evaluation.json"):
        assert not list(result.parent.rglob("last*.pt"))
        assert len(list(result.parent.rglob("model.pt"))) == 1
    assert not list((runs / "tiny" / "ray").rglob("*.pt")), "Ray keeps no copies"
    assert not list(runs.rglob("*.tmp"))


def test_addresses_of_the_comparison_are_printed(folder, stories):
    out = stories[1][1][0]
    assert re.search(r"charts: http://127.0.0.1:5000/#/experiments/\d+/runs\?compareRunsMode=", out)
    runs = children(folder)
    assert {run.info.status for run in runs} == {"FINISHED", "KILLED", "FAILED"}
    for run in runs:  # The table compares figures of finished trials.
        assert (run.info.run_id in out) == (run.info.status == "FINISHED")


def test_nothing_secret_is_written(folder, stories):
    secret = Path(os.environ[SECRET_FILE_VARIABLE]).read_text().strip()
    assert len(secret) == 64
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content
            assert bytes.fromhex(secret) not in content


def test_the_same_command_again_retries_only_what_failed(folder, stories):
    codes, told = stories
    assert codes[2] == 1
    assert "2 of 3 trials had finished before" in told[2][1], "nor what was stopped early"


def test_another_sweep_under_the_same_name_is_refused(folder, stories):
    process = start(folder, "training.num_steps=21")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "base.training.num_steps: 20 -> 21" in err
    assert "name=" in err
