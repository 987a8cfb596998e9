"""The ledger under processes that race, die at any point, or come back from the dead.

This file is also the program that those processes run: `test_ledger_processes.py ACT FOLDER ...`.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from by_library import epsilon_of, subsampled_gaussian

from core.errors import UserError
from core.privacy.ledger.admission import BudgetExceededError
from core.privacy.ledger.ledger import Ledger
from core.privacy.ledger.terms import Event, Key, Terms

STEP = Event("dp_sgd", 0.05, 8.0, 10)
TERMS = Terms("ab" * 32, 1_000, 1e-5, "zero_out", None)
NUM_PROCESSES, NUM_EACH, NUM_AFFORDABLE = 8, 4, 11


def key(trial: str, run: str = "sweep") -> Key:
    return Key(run, trial, "all", 0, STEP.count)


def epsilon(num_reservations: int) -> float:
    count = STEP.count * num_reservations
    event = subsampled_gaussian(STEP.sample_rate, STEP.noise_multiplier, count)
    return epsilon_of([event], TERMS.delta, "zero_out")


def program(act: str, folder: Path, *more: object) -> list[str]:
    return [sys.executable, __file__, act, str(folder), *map(str, more)]


def in_child(act: Callable[[], None]) -> int:
    """Starts `act` in a forked process that ends with it; returns its number."""
    process = os.fork()
    if process == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return process


# What races: 8 processes reserve 4 trials each and one that all share; 11 are affordable.


def race(folder: Path) -> None:
    terms = replace(TERMS, budget=epsilon(NUM_AFFORDABLE))
    start = folder / "start"

    def compete(number: int) -> None:
        while not start.exists():
            time.sleep(0.001)
        ledger, admitted = Ledger.open(folder, terms), []
        for trial in ["shared", *(f"{number}-{i}" for i in range(NUM_EACH))]:
            try:
                ledger.reserve(key(trial), [STEP])
                admitted.append(trial)
            except BudgetExceededError:
                pass
        (folder / f"{number}.json").write_text(json.dumps(admitted))

    children = [in_child(lambda n=n: compete(n)) for n in range(NUM_PROCESSES)]
    start.touch()
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * NUM_PROCESSES


def test_racing_processes_do_not_overspend(tmp_path):
    subprocess.run(program("race", tmp_path), check=True, timeout=100)
    admitted = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(NUM_PROCESSES)]
    ledger = Ledger.at(next(tmp_path.glob("*.jsonl")))
    summary = ledger.summary()
    trials = [entry["trial"] for entry in summary["entries"]]
    assert len(trials) == len(set(trials)) == NUM_AFFORDABLE
    assert sorted(trials) == sorted({trial for each in admitted for trial in each})
    assert all("shared" in each for each in admitted)
    assert summary["epsilon_committed_and_reserved"] == epsilon(NUM_AFFORDABLE)
    assert ledger.verify() == 1 + NUM_AFFORDABLE


# What dies: every way to change a ledger, killed before every system call it makes.

ACTS: dict[str, Callable[[Ledger], object]] = {
    "reserve": lambda ledger: ledger.reserve(key("new"), [STEP]),
    "commit": lambda ledger: ledger.commit(ledger.reserve(key("old"), [STEP]), 4),
    "lease": lambda ledger: ledger.take_over("other", "host:1", 1),
}
CALLS = ((os, "write"), (os, "fsync"), (os, "replace"))


def begin(folder: Path) -> Ledger:
    ledger = Ledger.open(folder, TERMS)
    ledger.reserve(key("old"), [STEP])
    return ledger


def die_before_call(number: int) -> None:
    """Makes this process kill itself before its call of that number, half-way if it writes."""
    calls = count()

    def dying(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if next(calls) == number:
                if original is write:
                    write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        return call

    write = os.write
    for module, name in CALLS:
        setattr(module, name, dying(getattr(module, name)))


def die(folder: Path, act: str) -> None:
    """Runs `act` on one new ledger for each point of death, until it outlives them all."""
    for number in count():
        place = folder / f"{number:03}"

        def doomed(place: Path = place, number: int = number) -> None:
            die_before_call(number)
            if act == "open":
                Ledger.open(place, TERMS)
            else:
                ACTS[act](Ledger.open(place, TERMS, known=True))

        if act != "open":
            begin(place)
        if os.waitpid(in_child(doomed), 0)[1] != signal.SIGKILL:
            return


def states(ledger: Ledger) -> dict[str, tuple[str, int | None]]:
    entries = ledger.summary()["entries"]
    return {entry["trial"]: (entry["state"], entry["executed_steps"]) for entry in entries}


@pytest.mark.parametrize("act", ["open", *ACTS])
def test_a_death_at_any_point_never_counts_short(tmp_path, act):
    subprocess.run(program("die", tmp_path, act), check=True, timeout=100)
    *deaths, outlived = sorted(place for place in tmp_path.iterdir())
    after = {
        "open": {},
        "reserve": {"old": ("reserved", None), "new": ("reserved", None)},
        "commit": {"old": ("committed", 4)},
        "lease": {"old": ("reserved", None)},
    }[act]
    assert states(Ledger.open(outlived, TERMS, known=True)) == after
    lines = Ledger.open(outlived, TERMS, known=True).verify()
    # Line, its fsync, folder; head and note, each with its fsync, rename and folder.
    assert len(deaths) == 11
    found: list[tuple[bool, int]] = []
    for place in deaths:
        torn = not next(place.glob("*.jsonl")).read_bytes().endswith(b"\n")
        ledger = Ledger.open(place, TERMS)
        found.append((torn, ledger.verify()))
        before = {} if act == "open" else {"old": ("reserved", None)}
        assert states(ledger) == (after if found[-1][1] == lines else before)
        if act in ACTS and found[-1][1] < lines:
            ACTS[act](ledger)  # The same again, as a restarted process does.
        assert states(ledger) == after
        assert ledger.verify() == lines
    # Only a torn line is lost: it never returned, so nothing can have run on it.
    whole = lines if act != "open" else 1
    assert found == [(True, lines - 1 if act != "open" else 1), *[(False, whole)] * 10]


# What is killed from outside: whatever it was told to be reserved is in the ledger.


def reserve_for_ever(folder: Path) -> None:
    ledger = Ledger.open(folder, TERMS)
    for number in count():
        ledger.reserve(key(str(number)), [STEP])
        print(number, flush=True)


def test_every_reservation_that_returned_outlives_a_kill(tmp_path):
    command = program("reserve_for_ever", tmp_path)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(20)]
        process.kill()
        told += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    kept = [int(trial) for trial in states(Ledger.open(tmp_path, TERMS, known=True))]
    assert kept[: len(told)] == told == list(range(len(told)))
    assert len(kept) <= len(told) + 1


# What comes back: a driver that slept while another took its run over.


def sleep_and_reserve(folder: Path) -> None:
    ledger = Ledger.open(folder, TERMS)
    ledger.take_over("sweep", "the sleeper", 1)
    print(1, flush=True)
    sys.stdin.readline()
    try:
        ledger.reserve(key("late"), [STEP])
    except UserError as error:
        sys.exit(f"error: {error}")


def test_a_driver_that_was_replaced_is_refused(tmp_path):
    command = program("sleep_and_reserve", tmp_path)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as sleeper:
        assert sleeper.stdout is not None
        assert int(sleeper.stdout.readline()) == 1
        successor = Ledger.open(tmp_path, TERMS, known=True)
        successor.take_over("sweep", "the successor", 2)
        before = successor.path.read_bytes()
        _, errors = sleeper.communicate("go on\n", timeout=60)
    assert sleeper.returncode == 1
    assert "another sweep took over run sweep (the successor holds token 2" in errors
    assert successor.path.read_bytes() == before


def test_a_hundred_earlier_trials_do_not_delay_the_next(tmp_path, monkeypatch):
    importlib.import_module("core.privacy.accounting.exact")  # A second, once in a process.
    with monkeypatch.context() as free:  # To write the hundred down is not what is measured.
        unbounded = {"epsilon_after": None, "accountant": None}
        free.setattr("core.privacy.ledger.ledger.admit", lambda *_: unbounded)
        terms = replace(TERMS, num_examples=60_000, budget=10.0)
        ledger = Ledger.open(tmp_path, terms)
        for i in range(100):
            events = trial(i)
            ledger.reserve(Key("sweep", str(i), "all", 0, events[1].count), events)
    began = time.process_time()
    events = trial(100)
    ledger.reserve(Key("sweep", "next", "all", 0, events[1].count), events)
    first = time.process_time() - began
    assert first < 2.0
    assert 9.4 < ledger.summary()["epsilon_committed_and_reserved"] <= 10
    with pytest.raises(BudgetExceededError, match=r"to [12]\d\.\d+ of its budget 10 "):
        ledger.reserve(key("too much"), [replace(STEP, sample_rate=1.0, noise_multiplier=1.0)])


def trial(number: int) -> tuple[Event, Event]:
    """Some 2,000 steps, each trial with noise of its own in both stages."""
    central = Event("central_images", 0.1, 5 + number / 100, 5)
    return central, Event("dp_sgd", 4096 / 60_000, 15 + number / 25, 2_197 - number)


if __name__ == "__main__":
    act, folder, *more = sys.argv[1:]
    {f.__name__: f for f in (race, die, reserve_for_ever, sleep_and_reserve)}[act](
        Path(folder), *more
    )
