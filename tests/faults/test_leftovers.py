"""Ten real trials, almost empty: when the sweep ends, no process is left, one checkpoint each."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from tiny_sweep import ROOT, sweep_text

MARK = "FETA_SWEEP_LEFTOVERS"
TRIALS = 10
HEAD = f"num_trials: {TRIALS}\nworkers_per_trial: 1\nsampler: random"


def marked(mark: str) -> list[str]:
    """Command lines of the processes that a sweep with this mark in its environment started."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # It has ended, or belongs to somebody else.
    return found


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, str]:
    folder, mark = tmp_path_factory.mktemp("leftovers"), uuid.uuid4().hex
    (folder / "sweep.yaml").write_text(sweep_text("ten", HEAD, num_steps=4))
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment |= {MARK: mark, "FETA_SWEEP_SECRET_FILE": str(folder / "secret")}
    process = subprocess.Popen(
        [sys.executable, ROOT / "sweep" / "run.py", "--config", folder / "sweep.yaml"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    out, _ = process.communicate()
    assert process.returncode == 0, out[-3000:]
    return folder / "runs", mark


def test_no_process_outlives_the_sweep(swept):
    deadline = time.monotonic() + 60
    while left := marked(swept[1]):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def test_a_trial_keeps_one_checkpoint(swept):
    runs, _ = swept
    trials = list((runs / "ten" / "trials").iterdir())
    assert len(trials) == TRIALS
    for trial in trials:
        assert [path.name for path in trial.rglob("last*.pt")] == ["last.pt"]
        assert len(list(trial.rglob("model.pt"))) == 1
    assert not list((runs / "ten" / "ray").rglob("*.pt")), "Ray keeps no copies"
    assert not list(runs.rglob("*.tmp"))
