"""Whose choice the card tells: that of a sweep among its trials, or of one among all runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from core.config import load
from core.errors import LedgerError
from core.privacy.ledger.card import card_markdown, make_card
from core.privacy.ledger.ledger import Ledger, events_of
from core.privacy.ledger.terms import Key, Terms
from core.privacy.plan.plan import make_plan

CONFIG = load("core/configs/digits.yaml")


@pytest.fixture(scope="module")
def plan():
    return make_plan(CONFIG)


@pytest.mark.parametrize(
    ("run", "chosen"),
    [
        ("sweep", "the best of 3 trials by accuracy"),
        ("alone", "the best of 4 releases on this data set by accuracy"),
    ],
)
def test_a_sweep_counts_its_trials_and_a_single_run_all_that_ran(
    plan, tmp_path: Path, run: str, chosen: str
):
    terms = Terms("0" * 64, plan.num_examples, plan.delta, plan.neighboring_relation, None)
    ledger = Ledger.open(tmp_path, terms)
    for name, trial in (("sweep", "a"), ("sweep", "b"), ("sweep", "c"), ("alone", "d")):
        ledger.reserve(Key(name, trial, "all", 0, plan.dp_sgd.num_steps), events_of(plan))
    trial = "a" if run == "sweep" else "d"
    card = make_card(ledger, run, plan, CONFIG.privacy, trial, "accuracy", searched=True)
    assert card["hyperparameters_chosen_by"] == chosen
    # One epsilon covers all that the choice was among.
    everything = ledger.summary()["epsilon_committed_and_reserved"]
    paid = ledger.epsilon_of_run("sweep") if run == "sweep" else everything
    assert card["epsilon_released_with_selection"] == paid > plan.epsilon
    assert ledger.epsilon_of_run("sweep") < everything


def test_nothing_is_stated_of_a_plan_that_was_not_charged(plan, tmp_path: Path):
    terms = Terms("0" * 64, plan.num_examples, plan.delta, plan.neighboring_relation, None)
    ledger = Ledger.open(tmp_path, terms)
    ledger.reserve(Key("run", "a", "all", 0, plan.dp_sgd.num_steps), events_of(plan))
    noisier = replace(plan.dp_sgd, noise_multiplier=2 * plan.dp_sgd.noise_multiplier)
    for other in (replace(plan, dp_sgd=noisier), replace(plan, central=None)):
        with pytest.raises(LedgerError, match=r"other releases than those of its privacy\.json"):
            make_card(ledger, "run", other, CONFIG.privacy, "a", "accuracy", searched=False)


@pytest.mark.parametrize("searched", [True, False])
def test_only_a_sweep_says_that_settings_were_chosen_on_public_data(
    plan, tmp_path: Path, searched: bool
):
    config = load("core/configs/digits.yaml", {"privacy.scope": "public"})
    terms = Terms("0" * 64, plan.num_examples, plan.delta, plan.neighboring_relation, None)
    ledger = Ledger.open(tmp_path, terms)
    ledger.reserve(Key("run", "a", "all", 0, plan.dp_sgd.num_steps), events_of(plan))
    card = make_card(ledger, "run", plan, config.privacy, "a", "accuracy", searched=searched)
    told = card_markdown(card)
    owner = "As the owner of the data states, all settings were chosen on other, public data"
    assert card["statement"].startswith(owner) is not searched
    assert ("on public data, as its owner states |" in told) is not searched
    assert ("on public data, by accuracy |" in told) is searched
    assert f"The one run on this data is ({plan.epsilon:.4g}, 1e-05)-diff" in card["statement"]
