"""What passes a run's questions on to the keeper of the ledgers is the account itself."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from two_ranks import TINY

from core.config import load
from core.errors import LedgerError
from core.privacy.ledger.account import Spending
from core.privacy.ledger.admission import BudgetExceededError
from core.privacy.ledger.ledger import Ledger
from core.privacy.plan.plan import PrivacyPlan, make_plan
from sweep.trials.keeper import Answer, Keeper, KeptAccount

STEPS, DATA = 200, "ab" * 32
SETTINGS = TINY | {"training.num_steps": STEPS, "stage_split": 0.0}


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return make_plan(load({}, SETTINGS))


def from_afar(account: Spending, question: str, arguments: tuple[Any, ...]) -> Answer:
    """As between processes: what is asked and answered is a copy, and each keeper is a new one."""
    copies = pickle.loads(pickle.dumps((account, question, arguments)))
    return pickle.loads(pickle.dumps(Keeper().ask(*copies)))


def account(folder: Path, plan: PrivacyPlan, run: str = "run", **changes: object) -> KeptAccount:
    places = {"runtime.ledger": str(folder / "ledger"), "runtime.cache": str(folder / "cache")}
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    config, run_dir = load({}, SETTINGS | places | changes), folder / run
    own = Spending(config, plan, folder / "ledger", run, run_dir, run_dir / "charged", lease=1)
    return KeptAccount(own, from_afar)


def train(account: KeptAccount, since: int, until: int) -> None:
    for step in range(since, until):
        if account.begins_block(step):
            account.count(step)


def entry(folder: Path) -> tuple[str, int | None]:
    (path,) = (folder / "ledger").glob("*.jsonl")
    (only,) = Ledger.at(path).summary()["entries"]
    return only["state"], only["executed_steps"]


def test_what_was_answered_lies_on_the_disk(tmp_path, plan):
    asked = account(tmp_path, plan)
    assert asked.known_fingerprint() is None
    reservation = asked.reserve(DATA, "trial")
    assert entry(tmp_path) == ("reserved", None)
    asked.remember(DATA)
    assert account(tmp_path, plan, "other").known_fingerprint() == DATA
    train(asked, 0, 60)
    (counter,) = (tmp_path / "ledger").glob("*.begun")
    assert counter.read_text().partition(" ")[0] == "75"
    assert asked.commit(DATA, reservation) == 75
    assert entry(tmp_path) == ("committed", 75)
    assert not counter.exists()


def test_a_dead_workers_reservation_counts_in_full_until_its_heir_settles(tmp_path, plan):
    train(dead := account(tmp_path, plan), 0, 0)
    late = dead.reserve(DATA, "trial")
    train(dead, 0, 110)
    assert entry(tmp_path) == ("reserved", None)
    heir = account(tmp_path, plan)
    reservation = heir.reserve(DATA, "trial", resumed=100)
    train(heir, 100, 160)
    with pytest.raises(LedgerError, match="another process has begun"):
        dead.count(125)  # Sent before its death, and read only now.
    with pytest.raises(LedgerError, match="another process has begun"):
        dead.commit(DATA, late)
    assert entry(tmp_path) == ("reserved", None)
    assert heir.commit(DATA, reservation) == 175
    assert entry(tmp_path) == ("committed", 175)


def test_refusals_and_warnings_reach_the_run_that_asks(tmp_path, plan, caplog):
    small = {"privacy__data_set_budget": plan.epsilon * 1.2}
    first = account(tmp_path, plan, **small)
    first.reserve(DATA, "trial")
    train(first, 0, 60)
    with pytest.raises(BudgetExceededError, match="would bring its data set to"):
        account(tmp_path, plan, "other", **small).reserve(DATA, "another")
    (counter,) = (tmp_path / "ledger").glob("*.begun")
    counter.unlink()
    caplog.clear()
    heir = account(tmp_path, plan, **small)
    assert heir.commit(DATA, heir.reserve(DATA, "trial")) == STEPS
    assert "all 200 count" in caplog.text
