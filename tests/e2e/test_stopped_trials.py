"""ASHA in a whole sweep through Tune, Optuna and MLflow; its trials are stand-ins."""

from pathlib import Path

import optuna
import pytest
from mlflow.tracking import MlflowClient
from test_pareto_sweep import SWEEP, drive

from core.privacy.ledger import Ledger
from sweep.config import SweepConfig
from sweep.results import load_rows
from sweep.stored import open_sweep
from sweep.study import open_storage

TRIALS = 6
ASHA = (
    SWEEP.replace("objective: [fid_cnn, accuracy]", "objective: [accuracy]")
    .replace("sampler: nsga2", "sampler: random\nscheduler: asha\nasha:\n  grace_fraction: 0.5")
    .replace("num_trials: 5", f"num_trials: {TRIALS}")
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, joined) -> tuple[SweepConfig, str]:
    folder = tmp_path_factory.mktemp("asha")
    out = drive(folder, ASHA, joined)
    return open_sweep(folder / "runs", "two"), out


def test_trials_below_the_median_so_far_end_themselves(swept):
    sweep, out = swept
    rates: list[float] = []
    for row in load_rows(sweep):
        rate = row.config.private_training.learning_rate
        stopped = bool(rates) and rate < sorted(rates)[len(rates) // 2 - (len(rates) % 2 == 0)]
        if stopped:
            assert row.state == "stopped"
            assert f"trial {row.trial} stopped at step 2: early_accuracy {rate:.4g}" in out
        rates.append(rate)
    assert {row.state for row in load_rows(sweep)} == {"finished", "stopped"}
    assert "Trials could also be stopped early" in out


def test_study_tracking_and_ledger_know_of_it(swept):
    sweep, _ = swept
    rows = load_rows(sweep)
    study = optuna.load_study(study_name="two", storage=open_storage(sweep.folder))
    done = [t.value for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    expected = [row.scores.get("accuracy", row.early_score) for row in rows]
    assert sorted(done) == pytest.approx(sorted(expected))
    storage = Path(sweep.storage_path)
    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'feta-sweep'")
    entries = Ledger.at(next((storage / "ledger").glob("*.jsonl"))).summary()["entries"]
    steps = {entry["trial"]: entry["executed_steps"] for entry in entries}
    for row in rows:
        query = f"tags.`sweep.key` = 'two/{row.trial}'"
        (run,) = client.search_runs([experiment.experiment_id], query)
        assert run.data.tags["sweep.state"] == row.state
        assert run.info.status == ("KILLED" if row.state == "stopped" else "FINISHED")
        assert run.data.metrics["early_accuracy"] == pytest.approx(
            row.config.private_training.learning_rate
        )
        assert steps[row.trial] == (2 if row.state == "stopped" else 4)
