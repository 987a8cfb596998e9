"""A sweep that is stopped asks its trials to keep their state, and waits, but not for long."""

import os
import signal
from collections.abc import Iterator

import pytest
from ray._private.state import state
from ray.experimental import internal_kv

from sweep.driver import stop as module
from sweep.driver.stop import Stop
from sweep.trials import notice
from sweep.trials.notice import Notice, ask_to_keep

STEP, OTHER = {"stage": "private_training", "step": 3, "loss": 1.0}, {"stage": "kept", "step": 0}


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    for each in (module, notice):
        monkeypatch.setattr(each.time, "monotonic", lambda: now[0])
    return now


def begun(over: list[bool], *trials: str) -> tuple[Stop, list[str]]:
    """With trials that train."""
    told: list[str] = []
    stop = Stop(lambda: bool(over), lambda: told.append("keep"), told.append)
    for trial in trials:
        stop.started(trial, {})
        stop.reported(trial, STEP)
    return stop, told


def test_all_end_once_those_that_train_have_kept_their_state(clock):
    over: list[bool] = []
    stop, told = begun(over, "a", "b", "c", "d")
    stop.started("waits", {})
    assert not stop.is_asked()
    assert not stop.is_due()
    over.append(True)
    assert stop.is_asked()
    assert not stop.is_due()
    stop.reported("a", OTHER)
    stop.reported("a", STEP)  # It goes on until it is ended.
    stop.ended("b", {})
    stop.died("c")
    assert not stop.is_due()
    stop.reported("d", OTHER)
    assert stop.is_due()
    assert told == ["stopping: 4 trials may keep the state until now", "keep"]


def test_one_that_does_not_answer_is_not_waited_for_longer_than_the_grace(clock):
    stop, _ = begun([True], "a")
    assert not stop.is_due()
    clock[0] += 19
    assert not stop.is_due()
    clock[0] += 2
    assert stop.is_due()


def test_nobody_is_asked_or_waited_for_where_nobody_trains(clock):
    stop, told = begun([True])
    assert stop.is_due()
    assert not told


@pytest.fixture
def as_before() -> Iterator[None]:
    answers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield
    for each, answer in answers.items():
        assert signal.getsignal(each) is answer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(as_before, number):
    stop, _ = begun([], "a")
    with stop.at_signals():
        assert not stop.is_asked()
        os.kill(os.getpid(), number)
        assert stop.is_asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


class Cluster:
    """Its store of values, and the machines that it will lose."""

    def __init__(self) -> None:
        self.values: set[tuple[str, str]] = set()
        self.draining: list[str] = []

    def put(self, key: str, value: str, *, namespace: str) -> None:
        self.values.add((key, namespace))

    def exists(self, key: str, *, namespace: str) -> bool:
        return (key, namespace) in self.values


@pytest.fixture
def cluster(monkeypatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(internal_kv, "_internal_kv_put", cluster.put)
    monkeypatch.setattr(internal_kv, "_internal_kv_exists", cluster.exists)
    monkeypatch.setattr(state, "get_draining_nodes", lambda: dict.fromkeys(cluster.draining, 0))
    return cluster


def test_a_trial_keeps_its_state_once_for_each_machine_and_once_for_a_stop(clock, cluster):
    told: list[str] = []
    asked = Notice(
        "mine", 7, ["n1", "n2"], lambda: told.append("lost"), lambda: told.append("kept")
    )

    def keeps() -> bool:
        clock[0] += 3
        return asked()

    assert not keeps()
    ask_to_keep("mine", 6)  # Of a driver before.
    ask_to_keep("other", 7)
    cluster.draining = ["n3"]
    assert not keeps()
    cluster.draining = ["n3", "n2"]
    assert keeps()
    assert told == ["lost"]
    assert not keeps()
    ask_to_keep("mine", 7)
    assert keeps()
    assert told == ["lost"], "it has yet to be kept"
    assert not keeps()
    assert told == ["lost", "kept"]
    assert not keeps()
    cluster.draining.append("n1")
    assert keeps()
    assert told == ["lost", "kept", "lost"]


def test_a_cluster_is_not_asked_at_every_step_and_may_be_busy(clock, cluster, monkeypatch):
    asked = Notice("mine", 7, ["n1"], lambda: None, lambda: None)
    ask_to_keep("mine", 7)
    assert asked()
    cluster.draining = ["n1"]
    clock[0] += 1
    assert not asked()

    def busy() -> dict[str, int]:
        raise RuntimeError("no answer")

    with monkeypatch.context() as other:
        other.setattr(state, "get_draining_nodes", busy)
        clock[0] += 2
        assert not asked()
    clock[0] += 2
    assert asked()
