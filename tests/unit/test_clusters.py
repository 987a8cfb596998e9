"""Launcher files: valid for the pinned Ray, and able to hold a trial."""

import copy
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from sweep.launch import DRIVER_RESOURCE

FILES = sorted(Path("clusters").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_launcher_file_is_valid_and_can_run_a_sweep(path):
    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(Exception, match="unknown_key"):
        validate_config(prepare_config({**copy.deepcopy(config), "unknown_key": 1}))
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, DRIVER_RESOURCE: 64}
    workers = [
        kind for name, kind in config["available_node_types"].items()
        if name != config["head_node_type"]
    ]  # fmt: skip
    assert workers
    assert all(kind["min_workers"] == 0 for kind in workers)
    assert config["idle_timeout_minutes"] <= 10


def test_there_is_a_launcher_file():
    assert FILES
