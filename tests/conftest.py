"""What every test shares: folders of its own, one thread, and no waiting for the disk."""

import os
import sys
from pathlib import Path

import pytest
import torch

for _folder in ("unit", "statistical", "integration", "e2e"):
    sys.path.insert(0, str(Path(__file__).parent / _folder))

# Tensors are small, so more threads would only wait; and sums keep their order, to the bit.
torch.set_num_threads(1)


# Files are shared out among processes: those that take longest begin first, in this order; those
# that also wait run beside others that do not.
_LONGEST = (
    "test_sweep.py",
    "test_experiments.py",
    "test_autoscaling.py",
    "test_killed_processes.py",
    "test_failing_trials.py",
    "test_lost_node.py",
    "test_no_shared_folder.py",
    "test_mlflow_away.py",
    "test_soak.py",
    "test_mlflow_ui.py",
    "test_scopes_in_sweeps.py",
    "test_python.py",
    "test_diverging_trials.py",
    "test_own_images.py",
    "test_autostop.py",
    "test_stopped_trials.py",
    "test_feta_pro.py",
    "test_ranks.py",
    "test_scope_spending.py",
    "test_shared_warm_up.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST)

    items.sort(key=place)


@pytest.fixture(autouse=True, scope="session")
def _private_folders(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp()
        patch.setenv("FETA_SWEEP_SECRET_FILE", str(folder / "secret" / "master.secret"))
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        patch.setenv("FETA_SWEEP_TEST_CACHE", str(folder / "cache"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """In this process: no power fails, and files of tests need not outlast that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
