"""From a folder of photographs to a verified bundle, by the commands of the first page."""

import os
import subprocess
import sys
from pathlib import Path

from test_init import write_photos

from sweep.results.find import open_sweep
from sweep.results.table import load_rows

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    *("num_trials=1", "training.num_steps=10", "sampler.num_steps=3", "model.base_channels=8"),
    "dataset.image_size=8",
    *("evaluation.num_images=40", "evaluation.classifier_epochs=1"),
    *("evaluation.extractor_epochs=1", "runtime.num_pictures=0"),
)


def type_in(folder: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_folder_of_photographs_becomes_a_bundle(tmp_path):
    write_photos(tmp_path / "photos")
    told = type_in(
        tmp_path,
        *(str(ROOT / "sweep" / "run.py"), "--data", "photos", "--epsilon", "10"),
        *("--publish-counts", "--minutes", "0.05", *SMALL),
    )
    assert "best trial" in told
    (row,) = load_rows(open_sweep(tmp_path / "runs", "photos-epsilon10"))
    bundle = str(tmp_path / "bundle")
    type_in(tmp_path, "-m", "core", "release", "--run-dir", str(row.run_dir), "--out", bundle)
    assert "as released" in type_in(tmp_path, "-m", "core", "release", "--verify", "--out", bundle)
