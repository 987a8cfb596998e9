"""Maker of `tests/data/interrupted_run`: a run that was killed after step 9 of 12.

`python tests/integration/interrupted_run.py` writes it anew. That is needed where what decides a
run (a setting, a version in its identity) changes on purpose; nothing else may demand it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "data" / "interrupted_run"
EXPECTED = "metrics_when_finished.jsonl"
SETTINGS = {
    "privacy.target_epsilon": 1.0,
    "training.num_steps": 12,
    "stage_split": 0.5,
    "central_images.per_class": 1,
    "private_training.learning_rate": 0.03,
    "private_training.expected_batch_size": 40,
    "private_training.max_physical_batch_size": 16,
    "model.base_channels": 4,
    "model.channel_multipliers": [1],
    "sampler.num_steps": 3,
    "evaluation.num_images": 30,
    "evaluation.batch_size": 16,
    "evaluation.classifier_epochs": 1,
    "evaluation.extractor_epochs": 1,
    "evaluation.fid_extractor": "cnn",
    "runtime.log_every": 1,
    "runtime.checkpoint_every": 2,
    "runtime.ledger": "ledger",
    "runtime.cache": "cache",
    "runtime.device": "cpu",
}


def command(root: Path) -> list[str]:
    """Arguments of `python -m core` that begin the run, or go on with it."""
    (root / "empty.yaml").touch()
    overrides = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]
    return ["run", "--config", str(root / "empty.yaml"), "--run-dir", "run", *overrides]


def main() -> None:
    """Runs it, kills it at step 9, keeps the folders, and what it reported once it had gone on."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        environment = os.environ | {
            "PYTHONPATH": str(FOLDER.parents[2]),
            "FETA_SWEEP_SECRET_FILE": str(root / "master.secret"),
            "OMP_NUM_THREADS": "1",
        }
        arguments = [sys.executable, "-m", "core", *command(root)]
        process = subprocess.Popen(arguments, env=environment, cwd=root)
        metrics = root / "run" / "metrics.jsonl"
        while not (metrics.exists() and '"step": 9' in metrics.read_text()):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        shutil.rmtree(FOLDER, ignore_errors=True)
        for name in ("run", "ledger"):
            shutil.copytree(root / name, FOLDER / name, ignore=shutil.ignore_patterns("*.lock"))
        shutil.copy(root / "master.secret", FOLDER)
        subprocess.run(arguments, env=environment, cwd=root, check=True)
        shutil.copy(metrics, FOLDER / EXPECTED)
    # No machine's path.
    for note in (FOLDER / "run" / "charged").iterdir():
        note.write_text(re.sub(r'"ledger": "[^"]*"', '"ledger": "ledger"', note.read_text()))


if __name__ == "__main__":
    main()
