"""A sweep at an address: its machines share no folder, and one after the other is lost."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import RATE, Lab, Sweep, laboratory, wait_for
from s3_store import s3, s3_store

from core.config import load, nested, short_digest
from core.pipeline.run import run
from core.privacy.keys import MasterSecret
from core.privacy.ledger.ledger import Ledger
from core.record.folder import RunFolder
from sweep.config.sweep import load_sweep
from sweep.results.folder_copy import copy_of_trial

BUCKET, RATES, STEPS = "apart", [1e-4], 200
HEAD = "workers_per_trial: 1"


class Place:
    """The lab, the sweep, and the folder in which each machine holds its data."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.head = lab, lab.folder / "head"
        lab.environment["XDG_DATA_HOME"] = str(self.head)  # Of the driver, too.
        lab.start_head(cpus=0, home=self.head)
        file = lab.sweep_file("apart", RATES, HEAD, STEPS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_DATA_HOME", str(self.head))
            patch.setenv("RAY_ADDRESS", lab.environment["RAY_ADDRESS"])
            config = load_sweep(file, {"storage_path": f"s3://{BUCKET}/runs"})
        self.sweep = Sweep(lab, file, config)
        point = config.trial_config({RATE: RATES[0]})
        self.ledger, self.trial = Path(point.runtime.ledger), short_digest(point)

    def machine(self, name: str) -> Path:
        home = self.lab.folder / name
        self.lab.start_node(f"--address={self.lab.environment['RAY_ADDRESS']}", home=home)
        return home

    def kept_step(self) -> int:
        """Of DP-SGD, in the checkpoint at the address; 0 before the first."""
        folder = RunFolder(self.lab.folder / "looked")
        copy_of_trial(self.sweep.config, self.trial).fetch(folder.path)
        path = folder.checkpoints / "last.pt"
        state: dict[str, Any] = torch.load(path) if path.exists() else {"stage": ""}
        return state["step"] if state["stage"] == "private_training" else 0

    def entries(self) -> list[dict[str, Any]]:
        (path,) = self.ledger.glob("*.jsonl")
        return Ledger.at(path).summary()["entries"]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    torch.set_num_threads(1)
    short = tempfile.TemporaryDirectory(prefix="feta-")  # It holds sockets.
    with short as folder, s3_store(BUCKET), laboratory(Path(folder)) as lab:
        yield Place(lab)


@pytest.fixture(scope="module")
def after_the_loss(place: Place) -> tuple[Place, list[Path], int]:
    """What is left when the worker's machine was lost, and another went on; the step kept."""
    homes = [place.machine("first")]
    driver = place.sweep.start()

    def kept() -> int:
        assert driver.poll() is None, driver.communicate()
        return place.kept_step()

    wait_for(kept, "checkpoint at the address", every=1)
    place.lab.lose_node()
    step = place.kept_step()
    homes.append(place.machine("second"))
    out, err = driver.communicate(timeout=900)
    assert driver.returncode == 0, out + err
    return place, homes, step


def test_another_goes_on_and_ends_as_undisturbed(after_the_loss, tmp_path):
    place, _, step = after_the_loss
    assert 0 < step < 0.75 * STEPS
    found = RunFolder(place.sweep.trials / place.trial)
    told = [each["step"] for each in found.reports()]
    assert told == sorted(told)
    (entry,) = place.entries()
    assert entry["state"] == "committed"
    assert entry["executed_steps"] == 0.75 * STEPS
    quiet = RunFolder(tmp_path / place.trial)
    quiet.path.mkdir()
    quiet.nonce.write_text(found.nonce.read_text())
    own = {"runtime.ledger": str(tmp_path / "ledger"), "runtime.cache": str(tmp_path / "cache")}
    config = load(nested(found.config()), own | {"runtime.ledger_copy": None})
    secret = MasterSecret(bytes.fromhex((place.lab.folder / "secret").read_text().strip()))
    run(config, quiet.path, master=secret, name="quiet", report=lambda _: None)
    model = torch.load(found.model)
    for name, value in torch.load(quiet.model).items():
        torch.testing.assert_close(model[name], value, rtol=0, atol=1e-5)
    result, expected = found.result(), quiet.result()
    assert result is not None
    assert expected is not None
    assert (result.identity, result.report["epsilon"]) == (
        expected.identity,
        expected.report["epsilon"],
    )


def test_each_machine_has_what_is_its_own_and_the_store_no_image(after_the_loss):
    place, homes, _ = after_the_loss
    names = {home: {path.name for path in home.rglob("*")} for home in (place.head, *homes)}
    for home in homes:
        assert not names[home] & {"ledger", "mlflow.db", "sweep.json", "launch"}
    assert {"mlflow.db", "sweep.json"} <= names[place.head]
    assert not [path for path in place.head.rglob("*.pt") if path.name != "model.pt"]
    # The machine that was lost keeps what it held; the one that ended in good order, nothing.
    left = [[path for path in home.rglob(".workers/**/*") if path.is_file()] for home in homes]
    assert [bool(files) for files in left] == [True, False]
    pages = s3().get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    keys = [each["Key"] for page in pages for each in page.get("Contents", [])]
    assert any(key.endswith("evaluation.json") for key in keys)
    for never in ("/cache/", "images-", "last.pt", "non_private", "mlflow.db", ".begun"):
        assert not [key for key in keys if never in key]
    (ledger,) = place.ledger.glob("*.jsonl")
    lines = [key for key in keys if key.startswith(f"runs/ledger/{ledger.stem}/")]
    assert len(lines) == len(ledger.read_bytes().splitlines())


def test_the_doctor_asks_every_machine_for_the_store(after_the_loss):
    place, *_ = after_the_loss
    code, told = place.sweep.finish("--doctor")
    assert code == 0, told
    assert "ok    storage shared and writable" in told


def test_a_new_head_shows_what_the_lost_one_had(after_the_loss):
    place, *_ = after_the_loss
    evaluation = place.sweep.trials / place.trial / "evaluation.json"
    before, entries = evaluation.read_bytes(), place.entries()
    shutil.rmtree(place.head)
    code, told = place.sweep.finish()
    assert code == 0, told
    assert f"best trial: {place.trial}" in told
    assert evaluation.read_bytes() == before
    assert place.entries() == entries
    assert (place.sweep.config.folder / "privacy_card.md").exists()
