"""The experiments on searches, whole and small: killed, stopped and asked again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from idx_files import write_idx
from sklearn.datasets import load_digits
from tiny_sweep import ROOT

TINY = """
dataset.image_size=8 dataset.num_examples=1437 central_images.image_size=8
central_images.expected_batch_size=1437 central_images.num_components=10
central_images.max_norm=3 central_images.noise_multiplier=8 training.num_steps=4
private_training.expected_batch_size=60 model.base_channels=8 sampler.num_steps=2
evaluation.num_images=60 evaluation.classifier_epochs=1 evaluation.extractor_epochs=1
privacy.selection_mean=1.05
"""
TRANSFER = """
import sys
import cells, transfer
from stand_in import DRIVE  # Whose scores rise with the learning rate.
cells.COMMAND = [sys.executable, "-c", DRIVE]
transfer.EPSILONS = (1.0, 10.0)
transfer.SETTINGS = {"private_training.learning_rate": (1e-4, 1e-3, 1e-2), "stage_split": (0.4,)}
sys.exit(transfer.main())
"""
PAYS = """
import sys
import search_pays
search_pays.EPSILONS, search_pays.NUM_TRIALS = (10.0,), 1
sys.exit(search_pays.main())
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Real digits in the files of MNIST."""
    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    images, labels = (data.images * 255 / 16).astype(np.uint8), data.target
    write_idx(
        folder,
        train_images=images[:1437],
        train_labels=labels[:1437],
        test_images=images[1437:],
        test_labels=labels[1437:],
    )
    return folder


def start(
    code: str, digits: Path, out: Path, joined: dict[str, str], *more: str
) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    folders = (ROOT / "tests" / "benchmarks", Path(__file__).parent, ROOT)
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, folders)), **joined}
    options = ["--data", str(digits), "--out", str(out), "--seeds", "0", "--size", "1", *more]
    return subprocess.Popen(
        [sys.executable, "-c", code, *options, "--set", *TINY.split()],
        cwd=out.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen, code: int = 0) -> str:
    out, err = process.communicate(timeout=500)
    assert process.returncode == code, err[-3000:]
    return out


def wait_for(process: subprocess.Popen, out: Path, pattern: str, count: int) -> None:
    """Until the sweeps have left so many files."""
    while len([*out.with_suffix("").glob(f"*/{pattern}")]) < count:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.2)


def finished(out: Path) -> dict[Path, int]:
    """By trial, when it ended."""
    found = out.with_suffix("").glob("*/trials/*/evaluation.json")
    return {path: path.stat().st_mtime_ns for path in found}


def test_transfer_is_killed_and_runs_no_trial_twice(tmp_path, digits, joined):
    out = tmp_path / "transfer.json"
    process = start(TRANSFER, digits, out, joined)
    wait_for(process, out, "trials/*/evaluation.json", 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = finished(out)
    told = ended(start(TRANSFER, digits, out, joined))
    after = finished(out)
    assert len(after) == 6
    assert before.items() <= after.items()
    rows = json.loads(out.read_text())
    assert len({(row["digest"], row["private_training.learning_rate"]) for row in rows}) == 6
    assert len(rows) == 6
    for score in ("accuracy", "fid_cnn"):
        assert f"| {score} | all settings | 1.00 (1.00 to 1.00) |" in told
        one_line = "1.00 (-1.00 to 1.00), no effect"
        assert f"| {score} | `private_training.learning_rate` | {one_line} |" in told
        assert f"| {score} | `stage_split` | no ranks |" in told
    assert ended(start(TRANSFER, digits, out, joined)) == told
    assert finished(out) == after
    assert len([*(tmp_path / "transfer" / "ledger").glob("*.jsonl")]) == 1


def test_search_pays_goes_on_after_its_slot_and_compares_all_ways(tmp_path, digits, joined):
    out = tmp_path / "pays.json"
    process = start(PAYS, digits, out, {}, "--budget", "60")
    wait_for(process, out, "trials/*/checkpoints/last.pt", 1)
    process.send_signal(signal.SIGINT)  # Its sweep is told the same when the slot is over.
    assert "| epsilon in all |" in ended(process, 3)
    assert not out.exists()
    told = ended(start(PAYS, digits, out, joined))
    rows = json.loads(out.read_text())
    assert [row["way"] for row in rows] == ["preset", "selection", "tune_then_train"]
    for row in rows:
        assert 0 <= row["accuracy"] <= 1
        assert row["seconds"] > 0
        assert f"| 10 | {row['way']} | {100 * row['accuracy']:.1f} | " in told
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
