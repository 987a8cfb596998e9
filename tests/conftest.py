"""What every test shares: the secret lives in a folder of its own, threads are few."""

import sys
from pathlib import Path

import pytest
import torch

for _folder in ("statistical", "integration"):
    sys.path.insert(0, str(Path(__file__).parent / _folder))


@pytest.fixture(autouse=True)
def _private_secret(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path_factory.getbasetemp() / "secret"
    monkeypatch.setenv("FETA_SWEEP_SECRET_FILE", str(folder / "master.secret"))


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(2)
