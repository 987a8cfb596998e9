"""One cluster of two nodes and one MLflow server for all faults; quiet runs to compare with."""

import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Ray reads these when it is imported. The token is this cluster's alone and is written nowhere.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

from lab import Lab, Undisturbed, laboratory
from leftovers import MARK, OF_TRIALS, assert_none_left


@pytest.fixture(scope="session")
def lab():
    torch.set_num_threads(1)
    short = tempfile.TemporaryDirectory(prefix="feta-")  # It holds sockets.
    with short as folder, laboratory(Path(folder)) as lab:
        yield lab


@pytest.fixture(scope="module")
def cluster(lab: Lab) -> Iterator[Lab]:
    """Each file has two nodes and the server, whatever the one before has lost."""
    lab.make_whole()
    yield lab
    # All sweeps have ended, in whatever way.
    assert_none_left(lab.environment[MARK], 180, OF_TRIALS)


@pytest.fixture(scope="session")
def undisturbed(lab: Lab) -> Undisturbed:
    return Undisturbed(lab.folder / "undisturbed", lab.folder / "secret")


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
