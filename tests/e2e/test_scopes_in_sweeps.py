"""The scopes `selection`, `public` and `tune_then_train` as whole sweeps on one machine.

The final run of scope `public` differs in its configuration alone, so trials are stand-ins there.
"""

import json
import re
from pathlib import Path
from shutil import rmtree

import pytest
from mlflow.tracking import MlflowClient
from stand_in import drive
from test_sweep import HEAD, start
from tiny_sweep import sweep_text

from core.__main__ import main
from core.errors import LedgerError
from core.privacy.keys import MasterSecret
from core.privacy.ledger.account import RELEASE_ID
from core.privacy.ledger.ledger import Ledger
from core.privacy.plan.scopes import STAYS_INSIDE
from sweep.__main__ import main as sweep_main
from sweep.config.scope import count_trials
from sweep.config.sweep import load_sweep
from sweep.driver.launch import Outcome
from sweep.results.find import open_sweep
from sweep.results.table import best, final_row, load_rows, released_row, write_card
from sweep.run import main as run_main

TINY = sweep_text("tiny", f"{HEAD}\nworkers_per_trial: 1\nmax_concurrent_trials: 1")
# Of 800 images, or where a score is private too, epsilon 1 does not pay for clearer ones.
NOISE = "central_images.noise_multiplier"
DIM = f"{NOISE}=20"


@pytest.fixture(scope="module")
def selection(tmp_path_factory, joined):
    folder = tmp_path_factory.mktemp("selection")
    (folder / "sweep.yaml").write_text(TINY)
    overrides = (
        DIM,
        "privacy.scope=selection",
        "privacy.selection_law=geometric",
        "privacy.selection_mean=1.05",  # Mostly one trial.
        "privacy.dp_accuracy_stddev=50",
        "objective.metric=dp_accuracy",
        "sampler=random",
        "num_trials=null",
    )
    process = start(folder, *overrides, **joined)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert "Traceback" not in out + err
    return folder, out


def test_only_the_selected_trial_leaves_and_nothing_tells_how_many_there_were(selection, capsys):
    folder, out = selection
    assert "best by dp_accuracy (dp(epsilon +" in out
    assert re.search(r"epsilon of the release with its selection: 1\b", out)
    card = json.loads((folder / "runs" / "tiny" / "privacy_card.json").read_text())
    assert card["scope"] == "selection"
    assert card["epsilon_computed"] is None
    assert card["epsilon_all_on_this_data_set"] == 1.0  # One release, whatever the number.
    assert card["epsilon_released_with_selection"] == 1.0
    assert card["epsilon_trial"] < 1.0
    assert {event["kind"] for event in card["events"]} >= {"dp_sgd", "dp_accuracy"}
    assert len({event["trial"] for event in card["events"]}) == 1
    trials = folder / "runs" / "tiny" / "trials"
    (chosen,) = trials.glob("*/selected.json")
    for run in trials.iterdir():
        code = main(["release", "--run-dir", str(run), "--out", str(folder / "out" / run.name)])
        assert code == (0 if run == chosen.parent else 2)
    assert (folder / "out" / chosen.parent.name / "privacy_card.md").exists()
    capsys.readouterr()
    assert sweep_main(["ls", "--json", "--storage", str(folder / "runs")]) == 0
    (overview,) = json.loads(capsys.readouterr().out)
    assert (overview["state"], overview["num_trials"]) == ("complete", None)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("feta-sweep")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`sweep.key` = 'tiny'")
    assert parent.data.params["num_trials"] == "secret"
    assert "epsilon_sweep" not in parent.data.metrics
    assert "must stay inside" in parent.data.tags["privacy.statement"]
    model = client.get_model_version_by_alias("tiny", "best")
    assert model.tags["trial"] == chosen.parent.name


def test_mlflow_is_told_of_one_trial_and_all_else_says_that_it_stays_inside(
    tmp_path, joined, capsys
):
    """Of four trials one; and what is not complete claims nothing."""
    (tmp_path / "sweep.yaml").write_text(TINY)
    overrides = {
        NOISE: 20,
        "privacy.scope": "selection",
        "dataset.public": True,
        "sampler": "random",
        "num_trials": None,
        "max_same_error": 1,
    }
    sweep = load_sweep(
        tmp_path / "sweep.yaml", overrides | {"storage_path": str(tmp_path / "runs")}
    )
    master, ids = MasterSecret.load(), (f"{number:032x}" for number in range(1000))
    kept = next(each for each in ids if count_trials(sweep.run, None, master, each) == 4)
    (sweep.folder / "charged").mkdir(parents=True)
    (sweep.folder / "charged" / RELEASE_ID).write_text(kept)
    settings = [f"{key}={'null' if v is None else v}" for key, v in overrides.items()]
    out, err = drive(tmp_path, TINY, joined, *settings)
    assert len(load_rows(sweep)) == 4
    assert out.startswith(STAYS_INSIDE)
    assert STAYS_INSIDE in err
    assert STAYS_INSIDE in (sweep.folder / "sweep.log").read_text().splitlines()[0]

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("feta-sweep")
    runs = client.search_runs([experiment.experiment_id])
    by_key = {run.data.tags["sweep.key"]: run for run in runs}
    winner = best(sweep, load_rows(sweep))
    assert by_key.keys() == {"tiny", f"tiny/{winner.trial}"}
    child, parent = by_key[f"tiny/{winner.trial}"], by_key["tiny"]
    assert [run.info.status for run in (child, parent)] == ["FINISHED", "FINISHED"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.metrics["accuracy"] == winner.scores["accuracy"]
    assert parent.data.tags["best_trial"] == winner.trial
    # Nothing in MLflow is older than the end of the last trial: times do not tell of the others.
    ends = max(path.stat().st_mtime for path in sweep.folder.glob("trials/*/evaluation.json"))
    begun = [run.info.start_time for run in runs]
    begun += [each.creation_time for each in client.search_experiments()]
    assert min(begun) >= 1000 * ends
    for name in parent.data.metrics:
        assert len(client.get_metric_history(parent.info.run_id, name)) == 1, name
    others = [row.trial for row in load_rows(sweep) if row.trial != winner.trial]
    told = json.dumps([run.to_dictionary() for run in runs])
    for file in Path(client.download_artifacts(parent.info.run_id, "")).rglob("*.*"):
        told += file.read_bytes().decode(errors="ignore")
    assert winner.trial in told
    assert not [trial for trial in others if trial in told]

    trials = [f"tiny/{row.trial}" for row in load_rows(sweep)[:2]]
    for command in (["ls"], ["show", "tiny"], ["best", "tiny"], ["diff", *trials]):
        where = [*command, "--storage", str(tmp_path / "runs")]
        capsys.readouterr()
        assert sweep_main(where) == 0
        assert capsys.readouterr().out.startswith(STAYS_INSIDE)
        assert sweep_main([*where, "--json"]) == 0
        shown = capsys.readouterr()
        json.loads(shown.out)
        assert shown.err.startswith(STAYS_INSIDE)
    where = ["--storage", str(tmp_path / "runs"), "--out"]
    assert sweep_main(["report", "--name", "tiny", *where, str(tmp_path / "page")]) == 0
    assert STAYS_INSIDE.replace("'", "&#39;") in (tmp_path / "page").read_text()
    assert sweep_main(["export", "tiny", *where, str(tmp_path / "all.csv")]) == 0
    assert STAYS_INSIDE in capsys.readouterr().out
    ledgers = str(tmp_path / "runs" / "ledger")
    assert main(["ledger", "show", "--folder", ledgers]) == 0
    assert capsys.readouterr().out.startswith(STAYS_INSIDE)

    rows = load_rows(sweep)
    other = next(row for row in rows if row.trial != winner.trial)
    with pytest.raises(LedgerError, match="may have left already, and no other may"):
        write_card(sweep, rows, other, True)
    (sweep.folder / "trials" / winner.trial / "selected.json").unlink()  # As before its end.
    assert sweep_main(["show", "tiny", "--storage", str(tmp_path / "runs")]) == 0
    told = capsys.readouterr().out
    assert "selection: not complete, so nothing is claimed yet" in told
    assert "privacy:" not in told


def test_settings_found_on_public_data_run_once_on_the_sensitive_data(
    tmp_path, joined, monkeypatch, capsys
):
    overrides = (
        DIM,
        "privacy.scope=public",
        "dataset.public=true",
        "num_trials=1",
        "final.dataset.name=idx",
        "final.dataset.path=/sensitive",
        "final.dataset.num_examples=800",
    )
    out, _ = drive(tmp_path, TINY, joined, *overrides)
    assert re.search(r"best trial: \w+ \(accuracy 0\.\d+, fid_cnn .*: public\)", out)
    assert re.search(r"final run: \w+ \(accuracy 0\.\d+, fid_cnn .*: non-private\)", out)
    assert "All settings were chosen on other, public data." in out
    ledgers = [Ledger.at(path) for path in (tmp_path / "runs" / "ledger").glob("*.jsonl")]
    by_size = {ledger.terms.num_examples: ledger.summary()["entries"] for ledger in ledgers}
    assert {count: len(entries) for count, entries in by_size.items()} == {1437: 1, 800: 1}
    assert by_size[800][0]["state"] == "committed"
    again, err = drive(tmp_path, TINY, joined, *overrides)  # Complete: nothing is run or charged.
    assert again == out
    assert not err
    assert [len(ledger.summary()["entries"]) for ledger in ledgers] == [1, 1]

    # As it is where the final run failed, then where it was refused before it began.
    sweep = open_sweep(tmp_path / "runs", "tiny")
    (final,) = [row for row in load_rows(sweep) if not row.config.dataset.public]
    for change in ((final.run_dir / "evaluation.json").unlink, lambda: rmtree(final.run_dir)):
        change()
        monkeypatch.chdir(tmp_path)  # A sweep's driver leaves it.
        ended = Outcome(sweep, load_rows(sweep), "", False, f"sqlite:///{tmp_path}/runs/mlflow.db")
        monkeypatch.setattr("sweep.driver.launch.run_sweep", lambda *_, told=ended: told)
        assert run_main(["--config", "sweep.yaml", *overrides]) == 1
        told = capsys.readouterr().out
        assert "final run: not finished, so nothing is claimed yet" in told
        assert "privacy:" not in told
        monkeypatch.chdir(tmp_path)
        assert sweep_main(["report", "--name", "tiny", "--storage", "runs", "--out", "page"]) == 0
        assert (
            "Final run: not finished, so nothing is claimed yet." in (tmp_path / "page").read_text()
        )


def test_tuning_trials_and_the_run_after_them_are_one_release(tmp_path, joined, capsys):
    """All of it by one command; the same command runs and charges nothing again."""
    overrides = (
        NOISE + "=60",
        "dataset.public=true",
        "privacy.scope=tune_then_train",
        "privacy.tuning_epsilon=0.2",
        "privacy.tuning_steps=0.5",
        "replicates=2",
        "num_trials=2",
    )
    out, _ = drive(tmp_path, TINY, joined, *overrides)
    assert re.search(r"best trial: \w+ \(accuracy", out)
    assert re.search(r"final run: \w+ \(accuracy", out)
    assert re.search(
        r"recommended setting: that of \w+ \(accuracy 0\.\d+ \+- 0, the mean of 2\)", out
    )
    assert "Up to 2 tuning trials and the final run after them, whatever chose" in out
    assert re.search(r"epsilon of all that was computed: 1\n", out)
    assert re.search(r"epsilon of all runs on this data set: 1 ", out)
    sweep = open_sweep(tmp_path / "runs", "tiny")
    rows = load_rows(sweep)
    final = final_row(sweep, rows)
    winner = best(sweep, rows)
    assert [row.config.training.num_steps for row in rows] == [10, 10, 20]
    assert [row.config.seed for row in rows] == [0, 1, 0]
    assert final == rows[-1] == released_row(sweep, rows)
    assert final.config.stage_split == winner.config.stage_split
    assert all(row.plan.epsilon <= 0.2 for row in rows[:2])
    assert 0.8 < final.plan.epsilon < 1.0
    (ledger,) = [Ledger.at(path) for path in (tmp_path / "runs" / "ledger").glob("*.jsonl")]
    entries = ledger.summary()["entries"]
    assert [entry["stage"] for entry in entries] == ["tuning", "tuning", "final run"]
    card = (sweep.folder / "privacy_card.md").read_text()
    assert "PLD of one privacy profile for each trial" in card
    assert "by accuracy (public), among the tuning trials" in card
    again, err = drive(tmp_path, TINY, joined, *overrides)
    assert again == out
    assert not err
    assert ledger.summary()["entries"] == entries

    # The whole counts from the first trial on, also for a run that goes on after its final run.
    (final.run_dir / "evaluation.json").unlink()
    assert sweep_main(["show", "tiny", "--storage", str(tmp_path / "runs")]) == 0
    assert "final run: not finished, so nothing is claimed yet" in capsys.readouterr().out
    resumed, _ = drive(tmp_path, TINY, joined, *overrides)
    assert f"final run: {final.trial}" in resumed
    assert ledger.summary()["epsilon_committed_and_reserved"] == 1.0
    drive(tmp_path, TINY, joined, *overrides[:-1], "num_trials=3", code=2)
