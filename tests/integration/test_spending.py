"""A run and its ledger: charged before the data is opened, settled after, released with a card."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from two_ranks import StopRunError, stop_at, tiny_run

from core.__main__ import main
from core.config import load
from core.data import Dataset, load_dataset
from core.errors import DataError, InfeasibleError, LedgerError
from core.pipeline import run as pipeline
from core.privacy.ledger.account import Spending
from core.privacy.ledger.ledger import Ledger


def summary_of(folder: Path) -> dict:
    (path,) = folder.glob("*.jsonl")
    return Ledger.at(path).summary()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, tiny_run(folder / "run", **{"runtime.ledger": str(folder / "ledger")})


@pytest.fixture
def never_opened(monkeypatch):
    def refuse(*_: object) -> Dataset:
        raise AssertionError("the data was opened")

    monkeypatch.setattr(pipeline, "load_dataset", refuse)


def test_a_finished_run_is_settled_at_what_its_plan_says(finished):
    folder, reports = finished
    summary = summary_of(folder / "ledger")
    (entry,) = summary["entries"]
    assert entry["state"] == "committed"
    assert entry["executed_steps"] == entry["end_step"] == 3
    assert summary["epsilon_committed"] == pytest.approx(reports[-1]["epsilon"], rel=1e-9)
    central, dp_sgd = entry["events"]
    plan = json.loads((folder / "run" / "privacy.json").read_text())
    for event, stage in ((central, plan["central"]), (dp_sgd, plan["dp_sgd"])):
        assert event["noise_multiplier"] == stage["noise_multiplier"]
        assert event["sample_rate"] == stage["sample_rate"]


def test_over_the_data_sets_budget_nothing_is_opened_or_charged(
    finished, tmp_path, request, monkeypatch
):
    ledger = tmp_path / "ledger"
    budget = {"runtime.ledger": str(ledger), "privacy.data_set_budget": 1.1}
    tiny_run(tmp_path / "first", **budget)
    before = {path.name: path.read_bytes() for path in ledger.iterdir()}
    request.getfixturevalue("never_opened")
    with pytest.raises(InfeasibleError, match=r"of its budget 1\.1 .*spent or reserved 0\.99"):
        tiny_run(tmp_path / "second", seed=1, **budget)
    assert {path.name: path.read_bytes() for path in ledger.iterdir()} == before
    assert not (tmp_path / "second" / "model.pt").exists()


def test_the_same_run_again_is_not_charged_again(finished, never_opened):
    folder, reports = finished
    before = summary_of(folder / "ledger")
    again = tiny_run(folder / "run", **{"runtime.ledger": str(folder / "ledger")})
    assert again == [reports[-1]]
    assert summary_of(folder / "ledger") == before


def test_changed_data_of_a_known_source_is_refused(finished, tmp_path, monkeypatch):
    folder, _ = finished
    shutil.copytree(folder / "ledger", tmp_path / "ledger")

    def changed(*arguments: object) -> Dataset:
        data = load_dataset(*arguments)
        return Dataset(data.train, data.test, "0" * 64)

    monkeypatch.setattr(pipeline, "load_dataset", changed)
    with pytest.raises(DataError, match="differs from what it was"):
        tiny_run(tmp_path / "run", seed=2, **{"runtime.ledger": str(tmp_path / "ledger")})
    assert not (tmp_path / "run" / "central_images").exists()


def test_a_stopped_run_pays_for_the_steps_that_began_and_needs_its_ledger(tmp_path):
    where = {"runtime.ledger": str(tmp_path / "ledger"), "runtime.checkpoint_every": 3}
    where |= {"training.num_steps": 34, "stage_split": 0.1, "runtime.log_every": 1}

    with pytest.raises(StopRunError):
        tiny_run(tmp_path / "run", stop_at(9), **where)
    (entry,) = summary_of(tmp_path / "ledger")["entries"]
    assert entry["state"] == "committed"
    assert 6 <= entry["executed_steps"] < entry["end_step"] == 31
    stopped = summary_of(tmp_path / "ledger")["epsilon_committed_and_reserved"]
    assert stopped < 0.95
    shutil.move(tmp_path / "ledger", tmp_path / "elsewhere")
    with pytest.raises(LedgerError, match="no ledger at"):
        tiny_run(tmp_path / "run", **where)
    shutil.rmtree(tmp_path / "ledger", ignore_errors=True)
    shutil.move(tmp_path / "elsewhere", tmp_path / "ledger")
    reports = tiny_run(tmp_path / "run", **where)
    (entry,) = summary_of(tmp_path / "ledger")["entries"]
    assert entry["executed_steps"] == 31
    assert entry["epsilon"] == pytest.approx(reports[-1]["epsilon"], rel=4e-6)


def test_a_run_that_lost_its_checkpoints_pays_for_the_steps_before(tmp_path, monkeypatch):
    where = {"training.num_steps": 60, "stage_split": 0.0, "runtime.log_every": 1}

    with monkeypatch.context() as killed:
        killed.setattr(Spending, "commit", lambda *_: 0)
        with pytest.raises(StopRunError):
            tiny_run(tmp_path, stop_at(40), **where)
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    with pytest.raises(StopRunError):
        tiny_run(tmp_path, stop_at(5), **where)
    (entry,) = summary_of(tmp_path / "ledger")["entries"]
    assert (entry["state"], entry["executed_steps"]) == ("committed", 50)


def test_a_lost_ledger_is_accepted_by_command_and_every_card_states_it(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "copy")
    run, ledger = tmp_path / "copy" / "run", tmp_path / "copy" / "ledger"
    where = {"runtime.ledger": str(ledger)}
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(finished[0]), str(tmp_path / "copy")))
    (path,) = ledger.glob("*.jsonl")
    path.unlink()
    path.with_suffix(".head").unlink()
    with pytest.raises(LedgerError, match="no ledger at"):
        tiny_run(tmp_path / "copy" / "second", seed=1, **where)
    assert main(["ledger", "accept-loss", "--file", str(path), "--reason", "disk failure"]) == 0
    tiny_run(tmp_path / "copy" / "second", seed=1, **where)
    out = tmp_path / "bundle"
    assert main(["release", "--run-dir", str(run), "--out", str(out)]) == 2  # Its charge is lost.
    assert "holds no entry of trial" in capsys.readouterr().err
    second = str(tmp_path / "copy" / "second")
    assert main(["release", "--run-dir", second, "--out", str(out)]) == 0
    card = json.loads((out / "privacy_card.json").read_text())
    assert "were lost: they are not included" in card["statement"]
    assert "disk failure" in card["statement"]
    assert "disk failure" in (out / "privacy_card.md").read_text()
    assert any("exactly this content" in item for item in card["not_covered"])


def test_the_default_ledger_is_the_same_in_every_working_directory(tmp_path, monkeypatch):
    found = set()
    for folder in (tmp_path, tmp_path.parent):
        monkeypatch.chdir(folder)
        found.add(load({}).runtime.ledger)
    assert found == {str(Path(os.environ["XDG_DATA_HOME"]) / "feta-sweep" / "ledger")}
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # Which its specification ignores.
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load({}).runtime.ledger == str(tmp_path / ".local/share/feta-sweep/ledger")


def test_the_release_holds_synthetic_images_card_and_digests_alone(finished, tmp_path, capsys):
    folder, reports = finished
    out = tmp_path / "bundle"
    assert main(["release", "--run-dir", str(folder / "run"), "--out", str(out)]) == 0
    card = json.loads((out / "privacy_card.json").read_text())
    epsilon = reports[-1]["epsilon"]
    assert card["epsilon_trial"] == pytest.approx(epsilon)
    assert card["epsilon_computed"] == pytest.approx(epsilon)
    times = math.ceil(100 * math.exp(epsilon)) / 100
    assert f"{times:.2f} times as likely" in card["odds"]["epsilon_trial"]
    assert card["num_examples"] == 1437
    page = (out / "privacy_card.md").read_text()
    assert "Not covered" in page
    assert "| central_images |" in page
    with np.load(folder / "run" / "synthetic" / "images.npz") as stored:
        images, labels = stored["images"], stored["labels"]
    with np.load(out / "images.npz") as released:
        assert (released["images"] == images).all()
        assert (released["labels"] == labels).all()
    table = parquet.read_table(out / "data" / "train-00000-of-00001.parquet")
    assert table["label"].to_pylist() == labels.tolist()
    pictures = sorted((out / "images").glob("*/*.png"), key=lambda path: path.name)
    assert len(pictures) == len(images)
    assert (np.array(Image.open(pictures[7])) == images[7, 0]).all()
    assert {path.name for path in out.iterdir()} == {
        "images", "images.npz", "data", "generator", "grid.png", "README.md", "privacy_card.json",
        "privacy_card.md", "digests.json",
    }  # fmt: skip
    assert "accuracy" not in page + json.dumps(card)
    # Whoever knows all records but one could test for that one by their digest.
    fingerprint = summary_of(folder / "ledger")["fingerprint"]
    published = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    trial = (folder / "run" / "trial_id").read_text()
    for secret in (fingerprint[:16], trial, str(folder)):
        assert not any(secret.encode() in content for content in published)

    assert main(["release", "--verify", "--out", str(out)]) == 0
    assert main(["release", "--run-dir", str(folder / "run"), "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
    pictures[7].write_bytes(pictures[8].read_bytes())
    assert main(["release", "--verify", "--out", str(out)]) == 2
    assert "is changed" in capsys.readouterr().err


def test_a_release_above_the_target_is_refused(finished, tmp_path, capsys):
    folder, _ = finished
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    config = (run / "config.yaml").read_text()
    assert "target_epsilon: 1.0" in config
    (run / "config.yaml").write_text(config.replace("target_epsilon: 1.0", "target_epsilon: 0.9"))
    assert main(["release", "--run-dir", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "does not agree with the configuration in target_epsilon" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_ledger_is_shown_and_verified(finished, tmp_path, capsys):
    folder, _ = finished
    assert main(["ledger", "show", "--folder", str(folder / "ledger")]) == 0
    assert "committed" in capsys.readouterr().out
    assert main(["ledger", "verify", "--folder", str(folder / "ledger")]) == 0
    assert "unbroken" in capsys.readouterr().out
    shutil.copytree(folder / "ledger", tmp_path / "ledger")
    (path,) = (tmp_path / "ledger").glob("*.jsonl")
    path.write_text(path.read_text().replace('"num_examples":1437', '"num_examples":1438'))
    assert main(["ledger", "verify", "--folder", str(tmp_path / "ledger")]) == 2
    assert "edited or truncated" in capsys.readouterr().err
    assert main(["ledger", "show", "--folder", str(tmp_path / "none")]) == 2
