"""Storage that is full: one clear line, nothing spent."""

import os
import subprocess
import sys

import pytest
from lab import ROOT


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk: root alone may")
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
