"""One cluster of two nodes and one MLflow server for all faults; quiet runs to compare with."""

import os
import secrets
import tempfile
from pathlib import Path

import pytest
import torch

# Ray reads these when it is imported. The token is this cluster's alone and is written nowhere.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

from lab import Lab, Undisturbed, laboratory


@pytest.fixture(scope="session")
def lab():
    torch.set_num_threads(1)
    short = tempfile.TemporaryDirectory(prefix="feta-")  # It holds sockets.
    with short as folder, laboratory(Path(folder)) as lab:
        yield lab


@pytest.fixture(scope="session")
def cluster(lab: Lab) -> Lab:
    if lab.server is None:
        lab.start_server()
    lab.start_nodes()
    return lab


@pytest.fixture(scope="session")
def undisturbed(lab: Lab) -> Undisturbed:
    return Undisturbed(lab.folder / "undisturbed", lab.folder / "secret")
