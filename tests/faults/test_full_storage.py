"""Storage that is full or fills up: one clear line, nothing spent or trained in vain."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lab import ROOT, Lab, Undisturbed, assert_as_undisturbed, ended

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk: root alone may")


@pytest.fixture
def small_disk():
    """Mounts disks of so many kilobytes for the test."""
    mounted = []

    def mount(folder: Path, kilobytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        options = ["-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        subprocess.run(["mount", "-t", "tmpfs", *options], check=True)
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_cannot_hold_a_run_is_refused_before_it_is_charged(small_disk, tmp_path):
    small_disk(tmp_path / "run", 900)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "core", "run", "--config", f"{ROOT}/core/configs/digits.yaml"),
            *("--run-dir", tmp_path / "run", f"runtime.ledger={tmp_path}/ledger"),
            f"runtime.cache={tmp_path}/cache",
        ],
        cwd=ROOT,
        env=os.environ | {"FETA_SWEEP_SECRET_FILE": str(tmp_path / "secret")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: '{tmp_path / 'run'}' has 0.")
    assert "nothing more was spent" in line
    assert not list(tmp_path.glob("ledger/*.jsonl"))


def test_a_disk_that_fills_up_stops_the_trial_which_goes_on_when_there_is_space(
    small_disk, cluster: Lab, undisturbed: Undisturbed
):
    sweep = cluster.sweep("full", [1e-4], "workers_per_trial: 1")
    kept = [(path, path.read_text()) for path in sweep.trials.glob("*/trial_id")]
    small_disk(sweep.trials, 6000)
    for path, text in kept:
        path.parent.mkdir()
        path.write_text(text)
    driver = sweep.start()
    trial = sweep.wait_for_trial(process=driver)
    filler = sweep.trials / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    code, told = ended(driver)
    assert code == 1
    assert "cannot be written (No space left on device)" in told
    state = torch.load(trial / "checkpoints" / "last.pt")
    assert state["step"] % 5 == 0, "the last checkpoint is whole"
    assert not (trial / "evaluation.json").exists()
    filler.unlink()
    code, told = sweep.finish()
    assert code == 0, told
    assert_as_undisturbed(sweep, undisturbed)
