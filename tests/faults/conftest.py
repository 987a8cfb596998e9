"""One cluster of two nodes and one MLflow server for all faults; quiet runs to compare with."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from lab import Lab, Undisturbed, laboratory


@pytest.fixture(scope="session")
def lab():
    torch.set_num_threads(1)
    short = tempfile.TemporaryDirectory(prefix="feta-")  # It holds sockets.
    with short as folder, laboratory(Path(folder)) as lab:
        for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            os.environ[key] = lab.environment[key]  # For the questions to the dashboard.
        yield lab


@pytest.fixture(scope="session")
def cluster(lab: Lab) -> Lab:
    lab.start_server()
    lab.start_nodes()
    return lab


@pytest.fixture(scope="session")
def undisturbed(lab: Lab) -> Undisturbed:
    return Undisturbed(lab.folder / "undisturbed", lab.folder / "secret")
