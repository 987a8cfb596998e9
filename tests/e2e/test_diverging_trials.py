"""A sweep with a learning rate that diverges: that trial has failed for good, the sweep has not."""

import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from test_sweep import start
from tiny_sweep import sweep_text

from core.__main__ import main
from core.privacy.ledger.ledger import Ledger
from sweep.results.find import open_sweep
from sweep.results.table import best, load_rows

HUGE = 1e20
SWEEP = sweep_text(
    "two",
    "num_trials: 2\nsampler: grid\nworkers_per_trial: 1\nmax_concurrent_trials: 1",
    f"  private_training.learning_rate:\n    choices: [{HUGE}, 0.001]\n",
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, joined) -> tuple[Path, str, str]:
    """What the command printed when it ran the sweep, and when it was given again."""
    folder = tmp_path_factory.mktemp("diverging")
    (folder / "sweep.yaml").write_text(SWEEP)
    told = []
    for _ in range(2):
        process = start(folder, "central_images.noise_multiplier=20", **joined)
        out, err = process.communicate(timeout=500)
        assert process.returncode == 1, err
        assert "Traceback" not in out + err
        told.append(out)
    return folder, *told


def test_it_is_failed_once_settled_and_never_the_best(swept, tmp_path):
    folder, first, again = swept
    assert first == again
    sweep = open_sweep(folder / "runs", "two")
    failed, finished = sorted(load_rows(sweep), key=lambda row: row.state)
    assert (failed.state, finished.state) == ("failed", "finished")
    assert failed.config.private_training.learning_rate == HUGE
    assert f"trial {failed.trial} failed: in private_training at step 1 of " in first
    assert "start anew with private_training.learning_rate below 1e+20" in first
    winner = best(sweep, load_rows(sweep))
    assert winner is not None
    assert winner.trial == finished.trial
    (path,) = (folder / "runs" / "ledger").glob("*.jsonl")
    entries = Ledger.at(path).summary()["entries"]
    assert [entry["state"] for entry in entries] == 2 * ["committed"]
    lines = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert lines.count("reserve") == 2, "it is not tried again"
    for row, code in ((failed, 2), (finished, 0)):
        out = tmp_path / row.trial
        assert main(["release", "--run-dir", str(row.run_dir), "--out", str(out)]) == code
        assert out.exists() == (code == 0)
        assert (row.run_dir / "selected.json").exists() == (code == 0), "the sweep is complete"


def test_mlflow_has_it_as_failed_and_registers_the_other(swept):
    folder, *_ = swept
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("feta-sweep")
    states = {}
    for row in load_rows(open_sweep(folder / "runs", "two")):
        query = f"tags.`sweep.key` = 'two/{row.trial}'"
        (run,) = client.search_runs([experiment.experiment_id], query)
        states[row.state] = run.info.status
        if row.state == "finished":
            assert client.get_model_version_by_alias("two", "best").run_id == run.info.run_id
    assert states == {"failed": "FAILED", "finished": "FINISHED"}
