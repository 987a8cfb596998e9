"""A trial costs driver and ledger the same, however many there were: counted in calls, not seconds.

`tests/faults/test_soak.py` lets many run at a time.
"""

import cProfile
import pstats
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stand_in import stand_in

from core.config import short_digest
from core.privacy.keys import MasterSecret
from core.privacy.ledger.ledger import Ledger
from core.privacy.ledger.terms import Event, Key, Terms
from sweep.config.sweep import load_sweep
from sweep.costs.usage import Meter
from sweep.driver.machines import Launches, Patience
from sweep.driver.observers import Relay
from sweep.driver.progress import Progress
from sweep.driver.stop import Stop
from sweep.results.claim import claim, driver_lock
from sweep.search.search import FeasibleSearch
from sweep.tracking.client import open_experiment, tracking_uri
from sweep.tracking.mirror import Mirror
from sweep.trials.trial import Context

EARLY, LATE = range(5, 9), range(20, 24)
# TPE looks at all earlier trials by nature.
SWEEP = """
name: many
base: {root}/core/configs/digits.yaml
num_trials: 40
sampler: random
max_hours: 9
fixed:
  stage_split: 0.0
  training.num_steps: 4
  privacy.target_epsilon: 1.0
  privacy.data_set_budget: 100.0
  runtime.ledger: {folder}/ledger
search_space:
  private_training.learning_rate:
    low: 1e-5
    high: 1e-1
    log: true
"""
ROOT = Path(__file__).resolve().parents[2]


def calls(act: Callable[[], Any]) -> tuple[int, Any]:
    """How many functions of Python it calls, and what it returns."""
    profile = cProfile.Profile(builtins=False)
    given = profile.runcall(act)
    return pstats.Stats(profile).total_calls, given


class Driver:
    """All that a driver does for a trial, but for Ray's part; each act is counted by its name."""

    def __init__(self, folder: Path) -> None:
        (folder / "sweep.yaml").write_text(SWEEP.format(root=ROOT, folder=folder))
        self.sweep = load_sweep(folder / "sweep.yaml", {"storage_path": str(folder / "runs")})
        MasterSecret.load()
        claim(self.sweep)
        with driver_lock(self.sweep.folder) as token:
            self.context = Context(self.sweep, token)
        uri, total = tracking_uri(folder / "runs"), 40
        open_experiment(uri, self.sweep.experiment, folder / "runs")
        self.progress = Progress(self.sweep, total, 0, False, verbosity=-1)
        self.mirror = Mirror(self.sweep, token, uri, total)
        self.meter = Meter(self.sweep)
        patience = Patience(self.sweep, self.progress.note, Launches, lambda: None)
        over = [self.meter.tick, patience.tick]
        self.stop = Stop(lambda: any(each() for each in over), lambda: None, self.progress.note)
        observers = [self.progress, self.mirror, self.meter, patience, self.stop]
        self.relay = Relay(self.sweep, observers)
        self.search = FeasibleSearch(self.sweep, {}, self.progress.pruned, 0, self.stop.is_asked)
        self.counts: dict[str, list[int]] = {}

    def run(self, number: int) -> None:
        """One trial, from its settings to MLflow's record of it."""

        def count(name: str, act: Callable[[], Any]) -> Any:
            made, given = calls(act)
            self.counts.setdefault(name, []).append(made)
            return given

        name = str(number)
        point = count("search", lambda: self.search.suggest(name))
        trial = SimpleNamespace(trial_id=name, config=point, last_result={})
        config = self.sweep.trial_config(point)

        digest = short_digest(config)
        told = count("trial", lambda: list(stand_in(self.context, config, digest)))
        trial.last_result = told[-1]

        def observe() -> None:
            self.relay.on_trial_start(0, [], trial)
            for report in told:
                self.relay.on_trial_result(0, [], trial, report)
            self.relay.on_trial_complete(0, [], trial)
            assert not self.stop.is_due()

        count("observers", observe)
        count("result", lambda: self.search.on_trial_complete(name, told[-1]))
        # What its thread does every few seconds.
        assert count("MLflow", lambda: self.mirror._look(False))


def spend(ledger: Ledger, number: int) -> None:
    """What a trial asks of the ledger of a data set with a budget; its noise is none other's."""
    key = Key("many", f"{number}", "all", 0, 64)
    events = (
        Event("central_images", 1.0, 12.0 + number / 8, 1),
        Event("dp_sgd", 0.02, 1.5 + number / 64, 64),
    )
    ledger.begun(key)
    ledger.commit(ledger.reserve(key, events), 64)


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> dict[str, list[int]]:
    driver = Driver(tmp_path_factory.mktemp("many"))
    terms = Terms("ab" * 32, 10_000, 1e-5, "zero_out", budget=100.0)
    ledger = Ledger.open(tmp_path_factory.mktemp("ledger"), terms)
    for number in range(LATE.stop):
        driver.run(number)
        made, _ = calls(partial(spend, ledger, number))
        driver.counts.setdefault("ledger", []).append(made)
    return driver.counts


@pytest.mark.parametrize("part", ["search", "trial", "ledger", "observers", "result", "MLflow"])
def test_no_part_of_a_trial_costs_more_than_of_the_trials_before(counts, part):
    early, late = (statistics.median(counts[part][n] for n in window) for window in (EARLY, LATE))
    print(f"\n{part}: {early:.0f} calls early on, {late:.0f} late")
    assert late <= 1.25 * early
