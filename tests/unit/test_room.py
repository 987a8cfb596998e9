"""How many trials a cluster holds, and when its lack of room is an error."""

import pytest

from core.errors import ConfigError
from sweep.cluster import check_room, join_cluster, max_concurrent
from sweep.config import load_sweep
from sweep.space import SameError

QUICKSTART = "sweep/configs/quickstart.yaml"


def sweep(**settings: object):
    return load_sweep(QUICKSTART, settings)


@pytest.mark.parametrize(
    ("nodes", "grows", "settings", "expected"),
    [
        ([{"CPU": 8, "trial_driver": 64}], False, {}, 4),
        ([{"CPU": 8, "trial_driver": 3}], False, {}, 3),
        ([{"CPU": 8, "GPU": 2, "trial_driver": 64}], False, {"gpus_per_worker": 1}, 1),
        ([{"trial_driver": 8}, {"CPU": 3}, {"CPU": 3}], False, {"cpus_per_worker": 2}, 1),
        ([{"trial_driver": 8}, {"CPU": 2}], True, {}, 8),
        ([{"trial_driver": 8}, {"CPU": 2}], True, {"max_concurrent_trials": 2}, 2),
        ([{"CPU": 1, "trial_driver": 8}], False, {"min_workers_per_trial": 1}, 1),
    ],
)
def test_trials_at_once(nodes, grows, settings, expected):
    assert max_concurrent(sweep(**settings), nodes, grows) == expected


def test_an_elastic_trial_needs_its_least_workers_alone(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:1")
    check_room(sweep(min_workers_per_trial=1), [{"CPU": 1}])
    with pytest.raises(ConfigError, match=r"needs 2 CPUs .*RAY_ADDRESS has 1: .*add node"):
        check_room(sweep(), [{"CPU": 1}])
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError, match=r"needs 2 GPUs .*this machine has 0: .*to a cluster"):
        check_room(sweep(gpus_per_worker=1), [{"CPU": 8}])


def test_a_worker_fits_on_one_node_or_not_at_all():
    check_room(sweep(cpus_per_worker=3), [{"CPU": 4}, {"CPU": 4}])
    with pytest.raises(ConfigError, match=r"2 workers with 3 CPUs each, .* hold 1: lower"):
        check_room(sweep(cpus_per_worker=3), [{"CPU": 4}, {"CPU": 2}])


def test_workers_of_a_trial_are_a_number_or_a_range():
    assert sweep().num_workers == 2
    assert sweep(min_workers_per_trial=1, workers_per_trial=4).num_workers == (1, 4)
    with pytest.raises(ConfigError, match="min_workers_per_trial=3 exceeds workers_per_trial=2"):
        sweep(min_workers_per_trial=3)


def test_only_the_same_error_in_a_row_counts():
    same = SameError(3)
    for failure in ("no file at 0x7f12", "no file at 0x7f99", "", "no file 1", "other"):
        same.ended(failure)
        assert not same.reached
    for free in (13, 12, 11):
        same.ended(f"no file {free}")
    assert same.reached == "3 trials in a row failed with the same error: no file 11"


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1:1", r"'127\.0\.0\.1:1' does not answer \(.*refused\): start the cluster"),
        ("http://127.0.0.1:8265", r"cannot be joined \(Invalid .*: name the head of a"),
        ("a..b:6379", r"'a\.\.b:6379' does not answer \(.*: start the cluster"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_sentence(monkeypatch, address, text):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=text):
        join_cluster()
