"""A node is lost: an elastic trial goes on with fewer workers, another says what it lacks."""

import json

import pytest
from lab import Lab, Undisturbed, assert_as_undisturbed, ended
from leftovers import MARK, OF_TRIALS, assert_none_left

HEAD = "min_workers_per_trial: 1"
# Gradients are added up in another order by fewer workers. Adam divides by their size, so what the
# rounding moves a parameter by grows with the rate: at 5e-4 some reach 1.5e-5 within 80 steps.
LEARNING_RATE = 1e-4


@pytest.fixture(scope="module")
def after_the_loss(cluster: Lab):
    """An elastic sweep whose trial loses the second node, one begun after the loss; their ends."""
    sweep = cluster.sweep("elastic", [LEARNING_RATE], HEAD)
    driver = sweep.start()
    trial = sweep.wait_for_trial(process=driver)
    cluster.lose_node()
    large = cluster.sweep("large", [LEARNING_RATE]).start()
    return sweep, trial, ended(driver), ended(large)


def test_the_trial_goes_on_with_one_worker(after_the_loss, undisturbed: Undisturbed):
    sweep, trial, (code, told), _ = after_the_loss
    assert code == 0, told
    assert json.loads((trial / "environment.json").read_text())["world_size"] == 2
    workers = [json.loads(line)["workers"] for line in (trial / "metrics.jsonl").open()]
    assert sorted(set(workers)) == [1, 2]
    assert workers[-1] == 1
    assert_as_undisturbed(sweep, undisturbed)


def test_what_is_left_is_too_small_for_a_trial_of_two_and_says_so(after_the_loss, cluster: Lab):
    *_, (code, told) = after_the_loss
    assert code == 2
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "one trial needs 2 CPUs" in line
    assert "the cluster at RAY_ADDRESS has 1" in line
    assert "no autoscaler is there that would add nodes" in line
    assert_none_left(cluster.environment[MARK], 60, OF_TRIALS)
