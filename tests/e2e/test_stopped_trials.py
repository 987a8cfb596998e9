"""ASHA and a limit in a whole sweep through Tune, Optuna and MLflow; its trials are stand-ins."""

import json
import re
from pathlib import Path

import optuna
import pytest
from mlflow.tracking import MlflowClient
from stand_in import drive
from test_pareto_sweep import SWEEP

from core.privacy.ledger.ledger import Ledger
from sweep.config.sweep import SweepConfig
from sweep.results.find import open_sweep
from sweep.results.table import load_rows
from sweep.search.study import open_storage

TRIALS = 6
ASHA = (
    SWEEP.replace("objective: [fid_cnn, accuracy]", "objective: [accuracy]")
    .replace("sampler: nsga2", "sampler: random\nscheduler: asha\nasha:\n  grace_fraction: 0.5")
    .replace("num_trials: 5", f"num_trials: {TRIALS}\ncpus_per_worker: 2")
)


@pytest.fixture(scope="module")
def stories(tmp_path_factory, joined) -> tuple[Path, list[tuple[str, str]]]:
    """The sweep meets its limit at once and goes on with a larger one."""
    folder = tmp_path_factory.mktemp("asha")
    limits = (("1e-5", 3), ("5", 0))
    return folder, [drive(folder, ASHA, joined, "--max-hours", x, code=code) for x, code in limits]


@pytest.fixture(scope="module")
def swept(stories) -> tuple[SweepConfig, str]:
    folder, told = stories
    return open_sweep(folder / "runs", "two"), told[1][0]


def test_a_limit_ends_the_sweep_in_one_line_that_says_how_to_go_on(stories):
    folder, told = stories
    line = r"stopped: max_hours=1e-05 is reached: (\S+) device hours .* larger max_hours"
    found = re.search(line, told[0][1])
    assert found is not None
    usage = json.loads((folder / "runs" / "two" / "usage.json").read_text())
    of_each = [row.seconds for row in load_rows(open_sweep(folder / "runs", "two"))]
    assert usage["device_seconds"] > 3600 * float(found[1]) + sum(of_each), "the starts add up"
    assert usage["device_seconds"] == pytest.approx(2 * usage["trial_seconds"])


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
