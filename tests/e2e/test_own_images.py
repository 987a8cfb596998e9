"""From a folder of images to a verified bundle, by the commands of the first page."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from leftovers import MARK, assert_none_left
from picture_files import write_folder
from published_files import write_parquet
from test_init import NAMES, write_photos

from core.__main__ import main
from sweep.results.find import open_sweep
from sweep.results.table import load_rows

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    *(
        "num_trials=1",
        "workers_per_trial=1",
        "training.num_steps=10",
        "sampler.num_steps=3",
        "model.base_channels=8",
    ),
    "dataset.image_size=8",
    *("evaluation.num_images=40", "evaluation.classifier_epochs=1"),
    *("evaluation.extractor_epochs=1", "runtime.num_pictures=0"),
)


def write_hub(folder: Path) -> None:
    for split, number in (("train", 60), ("test", 20)):
        labels = [n % 4 for n in range(number)]
        write_parquet(folder / "default" / split / "0000.parquet", labels, names=list(NAMES))


def write_archive(folder: Path) -> None:
    """As somebody else names and packs it: a folder too many, other splits, traces of a Mac."""
    for split in ("Training_set", "Valid"):
        write_folder(folder / "pets" / split, classes=3)
    (folder / "__MACOSX").mkdir()


@pytest.mark.parametrize("write", [write_photos, write_hub, write_archive])
def test_a_folder_becomes_a_bundle(tmp_path, capsys, write):
    write(tmp_path / "photos")
    command = [sys.executable, str(ROOT / "sweep" / "run.py"), "--data", "photos"]
    command += ["--epsilon", "10", "--publish-counts", "--minutes", "0.05", *SMALL]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {MARK: str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best trial" in done.stdout
    assert_none_left(str(tmp_path))
    (row,) = load_rows(open_sweep(tmp_path / "runs", "photos-epsilon10"))
    bundle = str(tmp_path / "bundle")
    assert main(["release", "--run-dir", str(row.run_dir), "--out", bundle]) == 0
    assert main(["release", "--verify", "--out", bundle]) == 0
    assert "as released" in capsys.readouterr().out
