"""`max_cost` against the bill of a simulated cloud with slow, idle and failing machines.

The cloud bills every machine from its launch to its end. Its nodes are shown to the counter in the
form of `ray.nodes()`, and those that start as a number, as Ray's autoscaler tells it.
"""

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pytest

from sweep.config.prices import price_of
from sweep.config.sweep import SweepConfig, load_sweep
from sweep.costs import usage
from sweep.costs.usage import WAITING, Meter
from sweep.driver.machines import count_machines

STEP = 15.0
PRICE = price_of("aws")
HEAD = {"Alive": True, "Resources": {"CPU": 0.0, "trial_driver": 8.0}}
MOST = 10.0
"""USD."""


@dataclass
class Worker:
    """A machine with one GPU; `life` are the seconds after which the cloud takes it away."""

    boot: float
    life: float = 1e9
    age: float = 0.0
    idle: float = 0.0
    trial: int | None = None

    @property
    def starts(self) -> bool:
        return self.age < self.boot


@dataclass
class Cloud:
    """Launches what trials lack; each trial takes two workers for `work` seconds.

    Attributes:
        boots, lives: of the machines, in the order in which they are launched, over and over.
        bill: USD of all that ran.
    """

    boots: tuple[float, ...] = (300.0,)
    lives: tuple[float, ...] = (1e9,)
    most: int = 8
    workers: list[Worker] = field(default_factory=list)
    launched: int = 0
    bill: float = 0.0

    @property
    def nodes(self) -> list[dict[str, Any]]:
        up = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}
        gone = {"Alive": False, "Resources": {}}
        return [HEAD, gone, *(up for each in self.workers if not each.starts)]

    @property
    def starting(self) -> int:
        return sum(each.starts for each in self.workers)

    def launch(self, wanted: int) -> None:
        while len(self.workers) < min(self.most, wanted):
            boot, life = (these[self.launched % len(these)] for these in (self.boots, self.lives))
            self.workers.append(Worker(boot, life))
            self.launched += 1

    def step(self, with_head: bool = True) -> None:
        self.bill += PRICE.of(len(self.workers) * STEP / 3600, with_head * STEP / 3600)
        for each in self.workers:
            each.age += STEP
            each.idle = 0.0 if each.trial is not None or each.starts else each.idle + STEP
        alive = [e for e in self.workers if e.age < e.life and e.idle < 60 * PRICE.idle]
        for lost in {e.trial for e in self.workers if e not in alive}:
            for each in alive:
                each.trial = None if each.trial == lost else each.trial
        self.workers = alive

    def place(self, trial: int) -> bool:
        held = [each for each in self.workers if each.trial == trial]
        free = [each for each in self.workers if each.trial is None and not each.starts]
        if not held and len(free) >= 2:
            free[0].trial = free[1].trial = trial
            return True
        return len(held) == 2


def run_driver(cloud: Cloud, meter: Meter, clock: Any, left: dict[int, float], at_once: int) -> str:
    """One driver, until all trials have ended or the meter says stop; returns why."""
    meter.machines = lambda: count_machines(cloud.nodes, cloud.starting)
    while left:
        running = list(islice(left, at_once))
        cloud.launch(2 * len(running))
        cloud.step()
        clock.now += STEP
        for trial in running:
            if cloud.place(trial):
                meter.reported(str(trial), {"stage": "private_training"})
                left[trial] -= STEP
            else:
                meter.reported(str(trial), {"stage": WAITING})
            if left[trial] <= 0:
                meter.ended(str(trial), {})
                del left[trial]
                for each in cloud.workers:
                    each.trial = None if each.trial == trial else each.trial
        if meter.tick():
            break
    meter.note()
    for each in cloud.workers:
        each.trial = None
    return meter.reason


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(usage.time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def sweep(tmp_path) -> SweepConfig:
    settings = {"gpus_per_worker": 1, "cloud": "aws", "max_cost": MOST, "runtime.device": "auto"}
    return load_sweep("tests/data/sweep.yaml", {"storage_path": str(tmp_path), **settings})


def let_idle(cloud: Cloud) -> None:
    while cloud.workers:
        cloud.step(with_head=False)


CLOUDS = {
    "quiet": (Cloud(), 3600.0, 4),
    "short trials": (Cloud(), 60.0, 4),
    "slow machines": (Cloud(boots=(300.0, 1500.0, 900.0)), 600.0, 4),
    "machines that fail": (Cloud(lives=(1e9, 1200.0, 200.0, 2400.0)), 1800.0, 4),
    "idle machines": (Cloud(boots=(60.0, 2400.0)), 300.0, 3),
}


@pytest.mark.parametrize("name", CLOUDS)
def test_a_sweep_ends_with_a_bill_of_about_its_limit(name, sweep, clock):
    cloud, work, at_once = CLOUDS[name]
    meter = Meter(sweep)
    reason = run_driver(cloud, meter, clock, dict.fromkeys(range(2_000), work), at_once)
    assert reason.startswith(f"max_cost={MOST:g} is reached: {MOST:g}")
    let_idle(cloud)
    held = PRICE.of(meter.usage().device_hours, 0)
    print(f"{name}: billed {cloud.bill:.2f} USD of {MOST:g}, of which trials held {held:.2f}")
    assert 0.8 * MOST <= cloud.bill <= 1.2 * MOST
    if name in ("slow machines", "idle machines"):
        assert held < 0.8 * cloud.bill, "what trials held would have done, too"


def test_a_killed_driver_and_the_next_one_count_together(sweep, clock):
    cloud, left = Cloud(), dict.fromkeys(range(2_000), 600.0)
    first = Meter(sweep)
    first.machines = lambda: count_machines(cloud.nodes, cloud.starting)
    for _ in range(130):  # Killed: it notes nothing at its end.
        cloud.launch(8)
        cloud.step()
        clock.now += STEP
        assert not first.tick()
    let_idle(cloud)
    clock.now += 7200.0  # Nothing runs, and the head is not this sweep's.
    assert run_driver(cloud, Meter(sweep), clock, left, 4)
    let_idle(cloud)
    assert 0.8 * MOST <= cloud.bill <= 1.2 * MOST


def test_what_a_node_is_billed_for():
    gpus = {"Alive": True, "Resources": {"GPU": 4.0}}
    found = count_machines([HEAD, gpus, {"Alive": True, "Resources": {"CPU": 2.0}}], 2)
    assert (found.gpus, found.passing, found.plain) == (12, 12, 2)
    own = {"Alive": True, "Resources": {"GPU": 2.0, "trial_driver": 64.0}}
    found = count_machines([own, {"Alive": False, "Resources": {"GPU": 8.0}}], 0)
    assert (found.gpus, found.passing, found.plain) == (2, 0, 0)
