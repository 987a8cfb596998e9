"""A reservation on a data set with a budget composes what is new, whatever was settled before.

Work is counted in mechanisms that are composed; every figure is compared with all of them composed
at once.
"""

import io
from pathlib import Path

import numpy as np
import pytest

from core.privacy.accounting import kept, solve
from core.privacy.accounting.exact import epsilon_of_many
from core.privacy.accounting.mechanism import COARSE, grouped
from core.privacy.keys import MasterSecret
from core.privacy.ledger import book, file
from core.privacy.ledger.admission import BudgetExceededError
from core.privacy.ledger.ledger import Ledger, Reservation
from core.privacy.ledger.terms import Event, Key, Terms

TERMS = Terms("ab" * 32, 10_000, 1e-5, "zero_out", budget=60.0)
STEPS = 64


def plan(number: int, shared: str = "") -> tuple[Event, ...]:
    """Of a trial: other noise than that of any other."""
    return (
        Event("central_images", 1.0, 20.0 if shared else 12.0 + number / 8, 1, release=shared),
        Event("dp_sgd", 0.02, 1.5 + number / 64, STEPS),
    )


class Book:
    """A ledger of which every call is the first of its process, and what its calls composed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, terms: Terms = TERMS) -> None:
        self.folder, self.terms, self.work = folder, terms, 0
        MasterSecret.load()
        compose = kept.composed

        def counted(mechanisms, *rest):
            self.work += len(mechanisms)
            return compose(mechanisms, *rest)

        monkeypatch.setattr(kept, "composed", counted)

    @property
    def ledger(self) -> Ledger:
        solve.epsilon_of_mechanisms.cache_clear()
        for memory in (book._added_up, file._verified_before):
            memory.clear()
        return Ledger.open(self.folder, self.terms)

    def reserve(self, number: int, shared: str = "", *, check: bool = True) -> Reservation:
        ledger, self.work = self.ledger, 0
        made = ledger.reserve(Key("run", f"{number}", "all", 0, STEPS), plan(number, shared))
        if check:
            self.assert_figure()
        return made

    def assert_figure(self) -> None:
        """The last figure is that of all that counts, composed at once, to what tails cost."""
        ledger = self.ledger
        with ledger._locked() as chain:
            entry = next(e for e in reversed(chain.entries) if e["kind"] == "reserve")
            charges = ledger._book(chain).charges.values()
        events = [
            ((event.release, event) if event.release else (number, event), event)
            for number, charge in enumerate(charges)
            for event in charge.counted
        ]
        once = dict(events)
        all_of = grouped((e.sample_rate, e.noise_multiplier, e.count) for e in once.values())
        found = [
            epsilon_of_many(all_of, TERMS.delta, TERMS.neighboring_relation, grid)
            for grid in (1e-4, COARSE)
        ]
        assert min(found) * (1 - 1e-7) <= entry["epsilon_after"] <= max(found) * (1 + 1e-7)
        if len(all_of) > 4:
            grid = float(entry["accountant"].rpartition(" ")[2])
            exact = epsilon_of_many(all_of, TERMS.delta, TERMS.neighboring_relation, grid)
            assert entry["epsilon_after"] == pytest.approx(exact, rel=1e-7)
            assert ledger.summary()["epsilon_committed_and_reserved"] == pytest.approx(
                exact, rel=1e-7
            )


@pytest.fixture
def spent(tmp_path, monkeypatch) -> Book:
    return Book(tmp_path, monkeypatch)


def test_the_work_of_a_reservation_does_not_grow_with_the_trials_before(spent):
    work: list[int] = []
    for number in range(40):
        made = spent.reserve(number, check=number % 13 == 12)
        work.append(spent.work)
        spent.ledger.commit(made, STEPS)
    print("mechanisms composed:", work)
    # What the trial before has settled, and the asked; anew alone where the grid changes.
    assert sorted(set(work[4:])) in ([4], [4, max(work)])
    assert sum(each > 4 for each in work) <= 2


def test_trials_that_run_stopped_early_or_go_on_again_are_composed_as_they_count(spent):
    made = [spent.reserve(number) for number in range(6)]
    for number, steps in ((0, STEPS), (2, STEPS), (4, 0)):
        spent.ledger.commit(made[number], steps)
    spent.reserve(6)
    spent.ledger.commit(made[1], 40)
    spent.reserve(7)
    before = spent.ledger.summary()["epsilon_committed_and_reserved"]
    spent.reserve(4)  # It goes on: all of its steps count again, and not those that it ran twice.
    assert spent.ledger.summary()["epsilon_committed_and_reserved"] > before
    spent.ledger.commit(made[4], STEPS)
    spent.reserve(8)


def test_one_release_of_several_trials_counts_once(spent):
    for number in range(6):
        made = spent.reserve(number, shared="the images")
        if number % 2:
            spent.ledger.commit(made, STEPS)


@pytest.mark.parametrize(
    "damage", ["gone", "torn", "bit", "unsealed", "text", "grid", "relation", "more", "version"]
)
def test_a_file_that_is_lost_damaged_or_of_other_mechanisms_changes_no_figure(
    spent, monkeypatch, damage
):
    for number in range(4):
        spent.ledger.commit(spent.reserve(number, check=False), STEPS)
    (path,) = spent.folder.glob("*.composed")
    if damage == "gone":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "bit":  # A smaller array: numpy stops before the sum of the member is checked.
        whole = path.read_bytes()
        place = whole.index(b"'shape': (") + len("'shape': (")
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
    elif damage == "unsealed":
        write(path, {"mechanisms": [(0.02, 1.5, STEPS)]})
        path.write_bytes(b"0" * 32 + path.read_bytes()[32:])
    elif damage == "text":
        path.write_text("nothing")
    elif damage == "version":
        with monkeypatch.context() as other:
            other.setattr(kept, "_version", lambda: "0")
            write(path, {})
    else:
        write(path, {"grid": {"grid": 2e-3}, "relation": {"relation": "replace_one"}}.get(
            damage, {"mechanisms": [(0.02, 1.5, STEPS), (0.02, 99.0, 1)]}))  # fmt: skip
    spent.reserve(4)
    assert spent.work >= 8, "what the file held was of no use"


def write(path: Path, changes: dict) -> None:
    """A file as another version, relation, grid or ledger would have left it, of little loss."""
    about = {"relation": "zero_out", "grid": COARSE, "mechanisms": [(0.02, 1.5, STEPS)], **changes}
    total = kept.composed([(0.02, 50.0, 1)], about["relation"], about["grid"])
    with path.open("wb") as opened:
        key = kept._key()
        kept._write(total, about["mechanisms"], key, about["relation"], about["grid"], opened)


def test_the_budget_ends_where_it_would_without_the_file(tmp_path, monkeypatch):
    def spend(folder: Path, *, forget: bool) -> tuple[int, str]:
        spent = Book(folder, monkeypatch, Terms("ab" * 32, 10_000, 1e-5, "zero_out", budget=1.0))
        for number in range(60):
            try:
                made = spent.reserve(number, check=False)
            except BudgetExceededError as error:
                assert spent.ledger.summary()["epsilon_committed_and_reserved"] <= 1.0
                return number, str(error)
            spent.ledger.commit(made, STEPS)
            for path in spent.folder.glob("*.composed") if forget else ():
                path.unlink()
        raise AssertionError("never refused")

    assert spend(tmp_path / "a", forget=False) == spend(tmp_path / "b", forget=True)


def test_what_is_kept_is_the_owners_alone_and_holds_no_more_than_the_ledger(spent):
    for number in range(4):
        spent.ledger.commit(spent.reserve(number, check=False), STEPS)
    spent.reserve(5, check=False)
    (path,) = spent.folder.glob("*.composed")
    assert path.stat().st_mode & 0o077 == 0
    with np.load(io.BytesIO(path.read_bytes()[kept._SEAL :])) as content:
        assert set(content) == {"about", "remove", "add"}
