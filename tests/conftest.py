"""What every test shares: the secret lives in a folder of its own, there is one thread."""

import sys
from pathlib import Path

import pytest
import torch

for _folder in ("unit", "statistical", "integration", "e2e"):
    sys.path.insert(0, str(Path(__file__).parent / _folder))

# Tensors are small, so more threads would only wait; and sums keep their order, to the bit.
torch.set_num_threads(1)


# Where files are shared out among processes, those that take longest begin first.
_LONGEST = ("test_sweep.py", "test_autoscaling.py", "test_killed_processes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.fixture(autouse=True, scope="session")
def _private_secret(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / "secret"
        patch.setenv("FETA_SWEEP_SECRET_FILE", str(folder / "master.secret"))
        yield
