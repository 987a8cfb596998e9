"""A driver is told to end: its trial keeps its state at once, and the same command goes on."""

import pytest
import torch
from lab import Lab, Undisturbed, assert_as_undisturbed, ended, wait_for

# Nothing but the stop leads to a checkpoint before the end, and no failure is allowed.
HEAD = "max_failures: 0\nmax_preemptions: 0"
SETTINGS = ("runtime.checkpoint_every=100000", "runtime.log_every=1")
RATE, STEPS = 1e-4, 150


@pytest.fixture(scope="module")
def stopped(cluster: Lab):
    """The sweep, what was kept, and how the stopped driver and the next one ended."""
    sweep = cluster.sweep("stopped", [RATE], HEAD, steps=STEPS)
    driver = sweep.start(*SETTINGS)
    # Of DP-SGD: what begins it is kept anyway, at the end of the warm-up.
    wait_for(lambda: len(sweep.steps(driver)) > STEPS // 4 + 5, "steps of the trial")
    driver.terminate()
    first = ended(driver)
    (last,) = sweep.trials.glob("*/checkpoints/last.pt")
    kept = torch.load(last)
    return sweep, (kept["stage"], kept["step"]), first, sweep.finish(*SETTINGS)


def test_what_was_trained_is_kept(stopped):
    _, (stage, step), (code, told), _ = stopped
    assert code == 130, told
    assert "interrupted; the same command goes on where it stopped" in told
    assert stage == "private_training"
    assert step > 5


def test_the_same_command_goes_on_and_nothing_has_failed(stopped, undisturbed: Undisturbed):
    sweep, *_, (code, told) = stopped
    assert code == 0, told
    assert "failed" not in told
    assert_as_undisturbed(sweep, undisturbed)
