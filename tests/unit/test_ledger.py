"""The ledger: what it counts, what it refuses, and that no damage to its file goes unseen."""

import json
import math
import os
import re
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
from by_library import dp_events, epsilon_of, subsampled_gaussian
from dp_accounting import dp_event
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InfeasibleError, LedgerError, UserError
from core.privacy.accounting.mechanism import FINE
from core.privacy.accounting.rounding import upward
from core.privacy.ledger import file
from core.privacy.ledger.admission import BudgetExceededError
from core.privacy.ledger.book import Reservation
from core.privacy.ledger.card import ledger_text
from core.privacy.ledger.file import _canonical, _digest, locked
from core.privacy.ledger.ledger import Ledger, events_of
from core.privacy.ledger.names import ledger_path
from core.privacy.ledger.notes import beside_secret
from core.privacy.ledger.terms import Event, Key, Terms
from core.privacy.plan.plan import CentralPlan, DpSgdPlan, PrivacyPlan, ScorePlan

TERMS = Terms("ab" * 32, 1_000, 1e-5, "zero_out", None)
CENTRAL = Event("central_images", 0.1, 5.0, 5)
DP_SGD = Event("dp_sgd", 0.05, 8.0, 100)
EVENTS = (CENTRAL, DP_SGD)


def to_dp_event(event: Event) -> dp_event.DpEvent:
    return subsampled_gaussian(event.sample_rate, event.noise_multiplier, event.count)


def key(trial: str, steps: int = 100, run: str = "sweep") -> Key:
    return Key(run, trial, "all", 0, steps)


def epsilon(*events: Event, grid: float = FINE) -> float:
    return epsilon_of([to_dp_event(e) for e in events], TERMS.delta, "zero_out", grid)


def counted(ledger: Ledger) -> float:
    return ledger.summary()["epsilon_committed_and_reserved"]


def test_figures_are_those_of_the_accountant(tmp_path):
    ledger = Ledger.open(tmp_path, TERMS)
    one, two = (ledger.reserve(key(name), EVENTS, note=name) for name in ("one", "two"))
    summary = ledger.summary()
    assert summary["epsilon_committed"] == 0
    assert counted(ledger) == epsilon(replace(CENTRAL, count=10), replace(DP_SGD, count=200))
    ledger.commit(one, 100)
    summary = ledger.summary()
    assert summary["epsilon_committed"] == epsilon(*EVENTS)
    assert [entry["state"] for entry in summary["entries"]] == ["committed", "reserved"]
    of_each = [entry["epsilon"] for entry in summary["entries"]]
    assert of_each == pytest.approx([epsilon(*EVENTS)] * 2, rel=4e-6)
    assert summary["budget"] is None
    assert summary["fingerprint"] == TERMS.fingerprint
    assert "dp-accounting 0.6" in summary["accountant"]
    ledger.commit(two, 40)
    both = epsilon(replace(CENTRAL, count=10), replace(DP_SGD, count=140))
    assert counted(ledger) == ledger.summary()["epsilon_committed"] == both
    assert json.loads(json.dumps(ledger.summary())) == ledger.summary()
    text = ledger_text(ledger.summary())
    assert "40/100" in text
    assert "without a cap" in text
    assert f"{both:.4g}" in text


def test_central_images_count_in_full_once_any_of_it_ran(tmp_path):
    ledger = Ledger.open(tmp_path, TERMS)
    ledger.commit(ledger.reserve(key("a"), EVENTS), 0)
    assert counted(ledger) == epsilon(CENTRAL)
    ledger.commit(ledger.reserve(key("b"), [DP_SGD]), 0)
    assert counted(ledger) == epsilon(CENTRAL)


def test_a_plan_reserves_all_that_it_releases():
    central, dp_sgd = CentralPlan(5, 0.1, 5.0, 8.0, 10.0), DpSgdPlan(100, 0.05, 8.0, 1.0, 50)
    plan = PrivacyPlan(
        num_examples=1_000,
        target_epsilon=10.0,
        delta=1e-5,
        neighboring_relation="zero_out",
        scope="trial",
        public_data=False,
        central=central,
        dp_sgd=dp_sgd,
        score=None,
        epsilon=1.0,
        epsilon_central=0.1,
        epsilon_score=0.0,
    )
    assert events_of(plan) == EVENTS
    assert [to_dp_event(event) for event in events_of(plan)] == dp_events(plan.mechanisms)
    assert events_of(replace(plan, central=None)) == (DP_SGD,)
    scored = replace(plan, score=ScorePlan(50.0))
    assert events_of(scored) == (*EVENTS, Event("dp_accuracy", 1.0, 50.0, 1))
    assert [to_dp_event(event) for event in events_of(scored)] == dp_events(scored.mechanisms)


def test_many_mechanisms_compose_to_an_upper_bound_that_is_as_good_as_exact(tmp_path):
    events = [Event("dp_sgd", 0.02 + 0.01 * i, 8.0 + 2.0 * i, 90 + 7 * i) for i in range(6)]
    ledger = Ledger.open(tmp_path, TERMS)
    for i, event in enumerate(events):
        ledger.reserve(key(str(i), event.count), [event])
    exact = epsilon(*events)
    assert exact <= counted(ledger) <= exact * (1 + 1e-5)
    relation = replace(TERMS, fingerprint="cd" * 32, neighboring_relation="replace_one")
    ledger = Ledger.open(tmp_path, relation)
    for i, event in enumerate(events):
        ledger.reserve(key(str(i), event.count), [event])
    plain = [to_dp_event(event) for event in events]
    exact = epsilon_of(plain, 1e-5, "replace_one", FINE)
    assert exact <= counted(ledger) <= exact * (1 + 1e-5)


def test_the_coarse_figure_of_large_ledgers_is_still_an_upper_bound(tmp_path):
    events = [Event("dp_sgd", 0.05, 8.0 + 0.5 * i, 40) for i in range(6)]
    ledger = Ledger.open(tmp_path, replace(TERMS, budget=100.0))
    for i, event in enumerate(events):
        ledger.reserve(key(str(i), 40), [event])
    summary = ledger.summary()
    assert summary["accountant"].endswith("discretization 0.001")
    exact = epsilon(*events)
    assert exact <= summary["epsilon_committed_and_reserved"] <= exact * 1.05


def test_a_reservation_over_the_budget_changes_nothing(tmp_path):
    budget = epsilon(replace(CENTRAL, count=10), replace(DP_SGD, count=200))
    ledger = Ledger.open(tmp_path, replace(TERMS, budget=budget))
    ledger.commit(ledger.reserve(key("a"), EVENTS), 100)
    ledger.reserve(key("b"), EVENTS)  # Spends the budget to the last digit.
    before = ledger.path.read_bytes()
    with pytest.raises(BudgetExceededError) as refused:
        ledger.reserve(key("c", 1), [replace(DP_SGD, count=1)])
    figures = (
        epsilon(replace(DP_SGD, count=1)),
        epsilon(replace(CENTRAL, count=10), replace(DP_SGD, count=201)),
        budget,
        budget,
    )
    step, total, most, before_it = (upward(each, 6) for each in figures)
    text = str(refused.value)
    assert text.startswith(f"reserving epsilon {step} for trial c")
    assert f"would bring its data set to {total} of its budget {most}" in text
    assert f"(spent or reserved {before_it})" in text
    assert isinstance(refused.value, InfeasibleError)
    assert ledger.path.read_bytes() == before
    less = replace(TERMS, fingerprint="cd" * 32, budget=math.nextafter(budget, 0))
    ledger = Ledger.open(tmp_path, less)
    ledger.reserve(key("a"), EVENTS)
    with pytest.raises(BudgetExceededError):
        ledger.reserve(key("b"), EVENTS)


def test_the_same_key_is_charged_once(tmp_path):
    ledger = Ledger.open(tmp_path, replace(TERMS, budget=epsilon(*EVENTS)))
    first = ledger.reserve(key("a"), EVENTS)
    before = ledger.path.read_bytes()
    assert ledger.reserve(key("a"), list(EVENTS)) == first
    assert Ledger.open(tmp_path, ledger.terms, known=True).reserve(key("a"), EVENTS) == first
    with pytest.raises(LedgerError, match="reserved for other releases"):
        ledger.reserve(key("a"), [CENTRAL, replace(DP_SGD, noise_multiplier=8.5)])
    assert ledger.path.read_bytes() == before
    ledger.commit(first, 100)
    before = ledger.path.read_bytes()
    assert ledger.reserve(key("a"), EVENTS) == first  # A finished run, started again.
    ledger.commit(first, 100)
    assert ledger.path.read_bytes() == before
    for other in (
        replace(key("a"), run="other"),
        key("b"),
        replace(key("a"), stage="more"),
        replace(key("a"), first_step=100, end_step=200),
    ):
        with pytest.raises(BudgetExceededError):
            ledger.reserve(other, EVENTS)


def test_a_stopped_trial_pays_for_its_steps_and_asks_again_before_it_goes_on(tmp_path):
    two = replace(DP_SGD, count=150)
    ledger = Ledger.open(tmp_path, replace(TERMS, budget=epsilon(two)))
    stopped = ledger.reserve(key("stopped"), [DP_SGD])
    ledger.commit(stopped, 30)
    assert counted(ledger) == epsilon(replace(DP_SGD, count=30))
    ledger.commit(stopped, 30)
    ledger.commit(stopped, 50)  # What ran is recorded.
    lines = ledger.path.read_bytes()
    for executed in (49, 101, -1):
        with pytest.raises(LedgerError, match=rf"={executed} is refused: it must be in \[50, 100"):
            ledger.commit(stopped, executed)
    assert ledger.path.read_bytes() == lines
    other = ledger.reserve(key("other"), [DP_SGD])
    with pytest.raises(BudgetExceededError, match="for trial stopped"):
        ledger.reserve(key("stopped"), [DP_SGD])
    ledger.commit(other, 50)
    ledger.reserve(key("stopped"), [DP_SGD])
    assert counted(ledger) == epsilon(two)
    with pytest.raises(BudgetExceededError):
        ledger.reserve(key("third", 1), [replace(DP_SGD, count=1)])
    ledger.commit(stopped, 50)
    assert counted(ledger) == epsilon(DP_SGD)


def void(ledger: Ledger, reservation: Reservation) -> None:
    """As earlier versions took a reservation back of which nothing ran."""
    with locked(ledger.path) as chain:
        chain.append("void", {"key": asdict(reservation.key)})


def test_what_was_voided_does_not_count_until_it_runs(tmp_path):
    ledger = Ledger.open(tmp_path, replace(TERMS, budget=epsilon(*EVENTS)))
    unused = ledger.reserve(key("a"), EVENTS)
    void(ledger, unused)
    assert counted(ledger) == 0
    assert ledger.summary()["entries"][0]["state"] == "void"
    used = ledger.reserve(key("b"), EVENTS)
    with pytest.raises(BudgetExceededError):
        ledger.reserve(key("a"), EVENTS)
    ledger.commit(used, 0)
    ledger.commit(unused, 100)  # It did run: the truth is recorded, though it is over the budget.
    assert counted(ledger) > ledger.terms.budget
    never = Reservation(key("never"), EVENTS)
    with pytest.raises(LedgerError, match="never reserved"):
        ledger.commit(never, 1)
    with pytest.raises(LedgerError, match="never reserved with these releases"):
        ledger.commit(Reservation(key("a"), (DP_SGD,)), 1)


def test_a_reservation_without_commit_counts_in_full(tmp_path):
    Ledger.open(tmp_path, TERMS).reserve(key("killed"), EVENTS)
    assert counted(Ledger.open(tmp_path, TERMS, known=True)) == epsilon(*EVENTS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_examples", 999),
        ("delta", 2e-5),
        ("neighboring_relation", "replace_one"),
        ("budget", 11.0),
        ("budget", None),
    ],
)
def test_other_terms_than_the_ledger_was_begun_with_are_refused(tmp_path, name, value):
    terms = replace(TERMS, budget=10.0)
    ledger = Ledger.open(tmp_path, terms)
    before = ledger.path.read_bytes()
    for way in (Ledger.open, partial(Ledger.open, known=True)):
        with pytest.raises(LedgerError, match=rf"^{name}={value!r}, but .* which never changes"):
            way(tmp_path, replace(terms, **{name: value}))
    assert ledger.path.read_bytes() == before
    assert Ledger.at(ledger.path).terms == terms


def test_the_ledger_of_another_data_set_is_refused(tmp_path):
    other = replace(TERMS, fingerprint="ab" * 31 + "cd")
    place = ledger_path(tmp_path, other.fingerprint)
    begun = Ledger.open(tmp_path, TERMS).path
    for suffix in (".jsonl", ".head", ".lock"):
        begun.with_suffix(suffix).rename(place.with_suffix(suffix))
    with pytest.raises(LedgerError, match="is of another data set: restore its own") as caught:
        Ledger.open(tmp_path, other, known=True)
    assert "abab" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"delta": 0.0}, r"delta=0.0 is refused: it must be in \(0, 1/N=0.001\)"),
        ({"delta": 1e-3}, "delta=0.001"),
        ({"delta": math.nan}, "delta=nan"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"neighboring_relation": "add"}, "must be zero_out or replace_one"),
        ({"budget": 0.0}, "budget=0.0"),
        ({"budget": -1.0}, "budget=-1.0"),
        ({"budget": math.nan}, "budget=nan"),
        ({"budget": math.inf}, "budget=inf"),
        ({"fingerprint": "ab"}, "64 hexadecimal digits"),
        ({"fingerprint": "../" + "a" * 61}, "64 hexadecimal digits"),
    ],
)
def test_meaningless_terms_are_refused(changes, text):
    with pytest.raises(UserError, match=text):
        replace(TERMS, **changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "other"),
        ("sample_rate", 0.0),
        ("sample_rate", 1.1),
        ("sample_rate", math.nan),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", math.nan),
        ("noise_multiplier", math.inf),
        ("count", 0),
    ],
)
def test_meaningless_events_are_refused(name, value):
    with pytest.raises(UserError, match=f"{name}={value!r} is refused"):
        replace(DP_SGD, **{name: value})


def test_meaningless_reservations_are_refused(tmp_path):
    ledger = Ledger.open(tmp_path, TERMS)
    before = ledger.path.read_bytes()
    for wrong, events, text in (
        (key("a", 99), [DP_SGD], "steps of the key=99 .* 100"),
        (key("a", 200), [DP_SGD, DP_SGD], "at most one"),
        (key("a", 0), [], "at least one event"),
        (replace(key("a"), first_step=-1, end_step=99), [DP_SGD], "first_step=-1"),
    ):
        with pytest.raises(LedgerError, match=text):
            ledger.reserve(wrong, events)
    with pytest.raises(TypeError):
        ledger.commit(ledger.reserve(key("a"), [DP_SGD]), 3.0)  # type: ignore[arg-type]
    assert ledger.path.read_bytes().startswith(before)
    assert counted(ledger) == epsilon(DP_SGD)


def test_a_missing_ledger_is_not_begun_anew_on_resume(tmp_path):
    folder = tmp_path / "ledger"
    with pytest.raises(LedgerError, match=r"^no ledger at .*[0-9a-f]{16}\.jsonl.*restore"):
        Ledger.open(folder, TERMS, known=True)
    assert not folder.exists()
    ledger = Ledger.open(folder, TERMS)
    ledger.path.unlink()
    for act in (
        lambda: ledger.reserve(key("a"), EVENTS),
        lambda: Ledger.open(folder, TERMS),
        lambda: Ledger.at(ledger.path),
        ledger.summary,
    ):
        with pytest.raises(LedgerError, match="it is shorter than its head says"):
            act()
    shutil.rmtree(folder)
    with pytest.raises(LedgerError, match="no ledger"):
        ledger.reserve(key("a"), EVENTS)


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match=r"cannot be used \(.*\): it needs a folder"):
        Ledger.open(tmp_path / "file", TERMS)


def test_an_older_writer_of_a_run_is_refused(tmp_path):
    first, second = Ledger.open(tmp_path, TERMS), Ledger.open(tmp_path, TERMS)
    first.take_over("sweep", "host:1", 1)
    reservation = first.reserve(key("a"), EVENTS)
    second.take_over("other", "host:2", 2)
    second.reserve(key("a", run="other"), EVENTS)
    first.reserve(key("b"), EVENTS)  # Another run's lease is no hindrance.
    worker = Ledger.open(tmp_path, TERMS, known=True, lease=1)
    lines = first.verify()
    worker.take_over("sweep", "host:1", 1)  # Another worker of the same driver.
    assert first.verify() == lines
    Ledger.open(tmp_path, TERMS).take_over("sweep", "host:3", 3)
    before = first.path.read_bytes()
    with pytest.raises(LedgerError, match="token=0 is refused: it must be positive"):
        worker.take_over("sweep", "host:1", 0)
    for ledger, held in ((first, "1"), (worker, "1"), (Ledger.open(tmp_path, TERMS), "none")):
        for act in (
            lambda ledger=ledger: ledger.reserve(key("a"), EVENTS),
            lambda ledger=ledger: ledger.commit(reservation, 5),
            *([lambda ledger=ledger: ledger.take_over("sweep", "x", 1)] if held == "1" else []),
        ):
            text = rf"another sweep took over run sweep \(host:3 holds token 3, .* {held}\)"
            with pytest.raises(LedgerError, match=text):
                act()
    assert first.path.read_bytes() == before
    Ledger.open(tmp_path, TERMS, lease=3).commit(reservation, 5)


FLOATS = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)


@settings(max_examples=30, deadline=None)
@given(rate=FLOATS.filter(lambda x: x <= 1), noise=FLOATS, count=st.integers(1, 2**60))
def test_events_come_back_exactly(tmp_path_factory, rate, noise, count):
    event = Event("dp_sgd", rate, noise, count)
    ledger = Ledger.open(tmp_path_factory.mktemp("ledger"), TERMS)
    ledger.reserve(key("a", count), [event])
    again = Ledger.at(ledger.path)
    again.reserve(key("a", count), [event])  # Refused, were it not the same to the last bit.
    assert again.verify() == 2


ACTS = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from(("reserve", "run", "commit"))),
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(acts=ACTS)
def test_what_ran_is_never_counted_short(tmp_path_factory, acts):
    """Trials that keep to the rules: reserve first, run, settle at what ran."""
    ledger = Ledger.open(tmp_path_factory.mktemp("ledger"), TERMS)
    ran, open_keys, settled = {"a": 0, "b": 0}, set(), set()
    for name, act in acts:
        reservation = Reservation(key(name, 4), (replace(DP_SGD, count=4),))
        if act == "reserve":
            ledger.reserve(reservation.key, reservation.events)
            if ran[name] < 4 or name not in settled:  # Of what ran whole, nothing is left to run.
                open_keys.add(name)
        elif name in open_keys and act == "run":
            ran[name] = min(4, ran[name] + 1)
        elif name in open_keys:
            ledger.commit(reservation, ran[name])
            open_keys.remove(name)
            settled.add(name)
        for entry in Ledger.open(ledger.path.parent, TERMS, known=True).summary()["entries"]:
            whole = entry["state"] == "reserved"
            assert (4 if whole else entry["executed_steps"] or 0) >= ran[entry["trial"]]
            assert whole == (entry["trial"] in open_keys)


def test_what_another_ledger_in_the_same_place_says_is_added_up_anew(tmp_path):
    folders = {name: tmp_path / name for name in "ab"}
    for name, folder in folders.items():  # As many lines, then one more.
        ledger = Ledger.open(folder, TERMS)
        for trial in ("", "2")[: 1 if name == "a" else 2]:
            ledger.reserve(key(f"{name}{trial}"), [DP_SGD])
    place = tmp_path / "place"
    for name in "abba":
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folders[name], place)
        again = Ledger.open(place, TERMS, known=True)
        found = [entry["trial"] for entry in again.summary()["entries"]]
        assert found == (["a"] if name == "a" else ["b", "b2"])
        assert again.verify() == len(found) + 1


class Written:
    """A small ledger whose last line the late head acknowledges and the early one does not."""

    def __init__(self, folder: Path, lines: int = 2) -> None:
        ledger = Ledger.open(folder, TERMS)
        for number in range(2, lines):
            ledger.reserve(key(str(number)), [DP_SGD])
        self.path, self.head = ledger.path, ledger.path.with_suffix(".head")
        self.early, self.early_head = self.path.read_bytes(), self.head.read_bytes()
        ledger.reserve(key("last"), [DP_SGD])
        self.late, self.late_head = self.path.read_bytes(), self.head.read_bytes()
        beside_secret(self.path).unlink()  # Here it is file and head alone that must tell.

    def accepted(self, content: bytes, head: bytes | None) -> bytes | None:
        """What the ledger then holds, repaired, or None where it is refused and left as it is."""
        for path, wanted in ((self.path, content), (self.head, head or b"")):
            path.touch()
            with path.open("r+b") as file:  # In place: a thousand new files would take seconds.
                file.write(wanted)
                file.truncate()
        if head is None:
            self.head.unlink()
        text = ""
        try:
            with locked(self.path):
                found = self.path.read_bytes()
        except LedgerError as error:
            text = str(error)
        if text:
            # How many lines there are would tell the number of a selection's trials.
            assert not re.search(r"\blines? \d|\b\d+ (whole )?lines?\b", text)
            assert self.path.read_bytes() == content
            assert "was edited or truncated" in text
            return None
        follows = {self.early: self.early_head, self.late: self.late_head}
        assert self.head.read_bytes() == follows[found]
        return found


def test_every_truncation_is_detected_or_is_that_of_an_append_that_never_returned(tmp_path):
    written = Written(tmp_path)
    for size in range(len(written.late)):
        cut = written.late[:size]
        assert written.accepted(cut, written.late_head) is None
        expected = written.early if len(written.early) <= size else None
        assert written.accepted(cut, written.early_head) == expected
    assert written.accepted(written.late, written.late_head) == written.late
    assert written.accepted(written.late, written.early_head) == written.late
    assert written.accepted(written.early, written.early_head) == written.early


@pytest.mark.parametrize("change", [0x01, 0x80])
def test_every_edited_byte_is_detected(tmp_path, change):
    written = Written(tmp_path)
    for position in range(len(written.late)):
        edited = bytearray(written.late)
        edited[position] ^= change
        assert written.accepted(bytes(edited), written.late_head) is None
        # Not yet acknowledged, and without its newline never whole: as if torn.
        torn = position == len(written.late) - 1
        found = written.accepted(bytes(edited), written.early_head)
        assert found == (written.early if torn else None)


def test_every_deleted_or_inserted_byte_is_detected(tmp_path):
    written = Written(tmp_path)
    for position in range(len(written.late)):
        before, after = written.late[:position], written.late[position:]
        assert written.accepted(before + after[1:], written.late_head) is None
        assert written.accepted(before + b" " + after, written.late_head) is None


def test_deleted_moved_repeated_and_added_lines_are_detected(tmp_path):
    written = Written(tmp_path, lines=4)
    first, second, third, last = written.late.splitlines(keepends=True)
    for lines in (
        (second, third, last),
        (first, third, last),
        (first, second, last),
        (first, second, third),
        (first, third, second, last),
        (first, second, third, third, last),
        (first, second, third, last, last),
        (first, second, third, last, b"\n"),
        (first, second, third, last, b"{}\n"),
        (first, second, third, last, b"[" * 9_999 + b"\n"),
        (first, second, third, b"NaN\n"),
    ):
        assert written.accepted(b"".join(lines), written.late_head) is None
    for head in (written.early_head, written.late_head, None):
        assert written.accepted(first + second, head) is None
    for head in (written.early_head, None):
        assert written.accepted(written.late + last[:-1], head) is None
    assert written.accepted(written.late + last[:-1], written.late_head) == written.late


def test_a_head_that_is_edited_or_gone_is_detected(tmp_path):
    written = Written(tmp_path)
    assert written.accepted(written.late, None) is None
    for position in range(len(written.late_head)):
        edited = bytearray(written.late_head)
        edited[position] ^= 1
        assert written.accepted(written.late, bytes(edited)) is None
        assert written.accepted(written.late, written.late_head[:position]) is None
    for head in (b"null\n", b"[1]\n", b'{"hash":1,"sequence":-1}\n', written.late_head + b" "):
        assert written.accepted(written.late, head) is None


def test_a_changed_figure_with_a_new_hash_breaks_the_chain(tmp_path):
    written = Written(tmp_path, lines=4)
    lines = written.late.splitlines(keepends=True)
    entry = json.loads(lines[2])
    entry["events"][0]["noise_multiplier"] *= 2
    entry["hash"] = _digest(entry)
    lines[2] = _canonical(entry) + b"\n"
    assert written.accepted(b"".join(lines), written.late_head) is None


def test_a_ledger_whose_begin_was_killed_is_begun_again(tmp_path):
    line = Ledger.open(tmp_path, TERMS).path.read_bytes()
    for size in (0, 1, len(line) // 2, len(line) - 1):
        folder = tmp_path / str(size)
        folder.mkdir()
        ledger_path(folder, TERMS.fingerprint).write_bytes(line[:size])
        with pytest.raises(LedgerError, match="no ledger"):
            Ledger.open(folder, TERMS, known=True)
        assert Ledger.open(folder, TERMS).verify() == 1


def test_lines_of_an_unknown_form_are_not_guessed_at(tmp_path):
    ledger = Ledger.open(tmp_path, TERMS)
    with locked(ledger.path) as chain, pytest.raises(ValueError, match="not JSON"):
        chain.append("reserve", {"key": math.nan})
    with locked(ledger.path) as chain:
        chain.append("refund", {"key": {}})
    with pytest.raises(LedgerError, match=r"a line of .* does not know"):
        ledger.summary()


def test_a_lock_that_is_never_freed_is_told_with_its_holder(tmp_path, monkeypatch):
    ledger = Ledger.open(tmp_path, TERMS)
    with ledger._locked():
        monkeypatch.setattr(file, "_PATIENCE_S", 0.1)
        with pytest.raises(LedgerError, match=rf"was locked for 0\.1 s .*process {os.getpid()} on"):
            ledger.verify()
    assert ledger.verify() == 1
