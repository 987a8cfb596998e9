"""Trials that wait for machines: what is told, and when the sweep ends."""

import os

import pytest

from core.errors import ConfigError
from sweep.config.sweep import load_sweep
from sweep.costs.usage import WAITING
from sweep.driver import machines
from sweep.driver.machines import Launches, Patience, wait_for_room

QUOTA = "VcpuLimitExceeded: You have requested more vCPU capacity than your current limit of 0"
TRAINS, WAITS = {"stage": "private_training"}, {"stage": WAITING}


class Clock:
    """Of the driver; the autoscaler does what `there` says."""

    now = 0.0
    there = Launches(nodes=1)
    freed = 0

    def free(self) -> None:
        self.freed += 1

    def time(self) -> float:
        return 1e9 + self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for name in ("time", "monotonic", "sleep"):
        monkeypatch.setattr(machines.time, name, getattr(clock, name))
    return clock


def waiting(clock: Clock, **settings: object) -> tuple[Patience, list[str]]:
    told: list[str] = []
    sweep = load_sweep("tests/data/sweep.yaml", settings)
    return Patience(sweep, told.append, lambda: clock.there, clock.free), told


def minutes(clock: Clock, patience: Patience, count: float) -> bool:
    """Lets time pass, in which the driver asks often; whether the search must end."""
    end = clock.now + 60 * count
    while clock.now < end:
        clock.now += 5
        if patience.tick():
            return True
    return False


def test_waiting_is_told_less_and_less_often_with_the_reason_and_ends_with_a_remedy(clock):
    patience, told = waiting(clock)
    patience.started("a", {})
    patience.started("b", {})
    clock.there = Launches(nodes=1, asked=4)
    assert not minutes(clock, patience, 0.9)
    assert not told
    clock.there = Launches(1, 4, 0, QUOTA, clock.time())
    assert not minutes(clock, patience, 29)
    assert told[0].endswith(f"4 machines asked for; one could not be started: {QUOTA}")
    assert "2 of 2 trials wait for workers since 1 minutes" in told[0]
    assert 3 <= len(told) <= 7
    assert minutes(clock, patience, 1)
    assert 30 * 60 <= clock.now <= 31 * 60
    assert patience.reason.startswith("max_wait=30: for so many minutes every trial waited")
    for part in (QUOTA, "4 machines asked for", "raise the cloud's quota", "goes on"):
        assert part in patience.reason


def test_a_machine_that_comes_or_a_trial_that_runs_lets_the_others_wait(clock):
    patience, told = waiting(clock, max_wait=10)
    patience.started("a", {})
    patience.started("b", {})
    assert not minutes(clock, patience, 9)
    clock.there = Launches(nodes=2)
    assert not minutes(clock, patience, 9)
    patience.reported("a", TRAINS)
    assert not minutes(clock, patience, 60)
    assert "1 of 2 trials wait" in told[-1]
    patience.reported("a", WAITS)  # Its machine was lost.
    assert not minutes(clock, patience, 9)
    patience.ended("a", {})
    assert minutes(clock, patience, 2)


def test_nothing_is_told_while_all_trials_run_nor_of_failures_before_the_sweep(clock):
    patience, told = waiting(clock, max_wait=1)
    clock.there = Launches(1, 0, 0, QUOTA, clock.time() - 60)
    assert not minutes(clock, patience, 5)
    patience.started("a", {})
    patience.reported("a", TRAINS)
    before = clock.freed
    assert not minutes(clock, patience, 60)
    assert not told
    assert clock.freed == before, "who has its workers misses nothing"
    patience.reported("a", WAITS)
    assert minutes(clock, patience, 3)
    assert clock.freed > before, "a supervisor that died may hold what it waits for"
    assert QUOTA not in patience.reason


def test_a_cluster_that_says_nothing_for_a_moment_is_as_it_was(clock):
    patience, told = waiting(clock)
    patience.started("a", {})
    clock.there = Launches(nodes=3, asked=2)
    assert not minutes(clock, patience, 2)
    clock.there = None  # type: ignore[assignment]
    assert not minutes(clock, patience, 2)
    assert "2 machines asked for" in told[-1]


@pytest.fixture
def cluster(clock, monkeypatch):
    """A joined cluster that has no room."""
    monkeypatch.setitem(os.environ, "RAY_ADDRESS", "somewhere:1")
    monkeypatch.setattr(machines, "node_resources", lambda: [{"trial_driver": 8.0}])
    monkeypatch.setattr(machines, "grows", lambda: True)
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: None)


def test_no_room_ends_at_once_soon_or_after_max_wait(cluster, clock, monkeypatch):
    sweep, told = load_sweep("tests/data/sweep.yaml", {"max_wait": 5}), []

    def wait(over: bool = False) -> None:
        wait_for_room(sweep, told.append, lambda: over, lambda: clock.there)

    with pytest.raises(ConfigError, match=r"has 0: .*has launched no node for it in 60 s"):
        wait()
    assert clock.now < 70
    clock.there = Launches(1, 2, 0, QUOTA, clock.time() + 1)
    with pytest.raises(ConfigError, match=f"max_wait=5: .*{QUOTA}"):
        wait()
    assert 300 < clock.now < 400
    assert any(QUOTA in line for line in told)
    wait(over=True)  # A limit is reached meanwhile.
    monkeypatch.setattr(machines, "grows", lambda: False)
    with pytest.raises(ConfigError, match="no autoscaler is there"):
        wait()
