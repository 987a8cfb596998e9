"""Members that an attack finds: against closed forms, in the right direction; words, table."""

import math
import re
from pathlib import Path

import pytest
from scipy.stats import norm

from core.config import PrivacyConfig, load
from core.privacy.accounting import renyi
from core.privacy.accounting.mechanism import FINE
from core.privacy.accounting.rounding import attack, upward
from core.privacy.accounting.solve import epsilon_of_mechanisms
from core.privacy.accounting.tradeoff import members_found
from core.privacy.ledger.card import make_card
from core.privacy.ledger.ledger import Ledger, events_of
from core.privacy.ledger.terms import Event, Key, Terms
from core.privacy.plan.budget import RunBudget
from core.privacy.plan.plan import make_plan
from core.privacy.plan.scopes import members_found as of_scope

ALARMS = (0.5, 0.01, 0.001)
CENTRAL, DP_SGD = (0.1, 5.0, 5), (4096 / 60_000, 2197)
README = Path(__file__).parents[2] / "core" / "privacy" / "README.md"


@pytest.mark.parametrize("alarms", ALARMS)
@pytest.mark.parametrize(("noise", "count"), [(1.0, 1), (0.3, 1), (10.0, 3), (4.0, 40)])
def test_of_gaussians_it_is_the_shifted_normal(noise, count, alarms):
    """Dong, Roth and Su 2022, equation 6."""
    exact = norm.cdf(norm.ppf(alarms) + math.sqrt(count) / noise)
    found = members_found(((1.0, noise, count),), "zero_out", alarms)
    assert exact <= found <= 1.003 * exact


@pytest.mark.parametrize("alarms", ALARMS)
@pytest.mark.parametrize(("rate", "noise"), [(0.1, 0.3), (0.5, 1.0), (0.01, 0.2)])
def test_of_a_sampled_gaussian_it_is_the_likelihood_ratio_test(rate, noise, alarms):
    """Members are found by a large outcome; of non-members, as seldom by a small one: the other
    direction is worth far less."""
    threshold = noise * norm.isf(alarms)
    exact = (1 - rate) * alarms + rate * norm.sf((threshold - 1) / noise)
    found = members_found(((rate, noise, 1),), "zero_out", alarms)
    assert exact <= found <= 1.003 * exact


def test_it_is_below_what_epsilon_says_and_ends_where_pld_does():
    mechanisms = (CENTRAL, (*DP_SGD[:1], 1.76, DP_SGD[1]))
    for delta in (1e-5, 1e-3):
        epsilon = epsilon_of_mechanisms(mechanisms, delta, "zero_out", FINE)
        for alarms in (1e-6, 1e-4, 0.01):
            allowed = math.exp(epsilon) * alarms + delta
            assert members_found(mechanisms, "zero_out", alarms) <= min(1.0, allowed)
    assert members_found((), "zero_out", 0.01) == 0.01
    assert members_found(((1.0, 0.0, 1),), "zero_out", 0.01) == 1
    assert members_found(((1.0, 0.01, 1),), "zero_out", 0.01) == 1
    replaced = members_found(((1.0, 4.0, 1),), "replace_one", 0.01)
    assert replaced == pytest.approx(norm.cdf(norm.ppf(0.01) + 2 / 4.0), rel=3e-3)


def test_words_round_up():
    text = attack(lambda alarms: 1.00001 * alarms)
    assert text.endswith("1 % (0.1 %) of non-members finds at most 1.01 % (0.101 %) of members")


def test_the_table_is_what_the_plan_gives():
    number = r"([\d.]+)"
    line = rf"^\| {number} \| {number} \| {number} % \| {number} % \|$"
    rows = re.findall(line, README.read_text(), re.M)
    assert [float(row[0]) for row in rows] == [0.5, 1, 2, 4, 8, 10]
    for target, noise, *shares in rows:
        mechanisms = (CENTRAL, (DP_SGD[0], float(noise), DP_SGD[1]))
        epsilon = epsilon_of_mechanisms(mechanisms, 1e-5, "zero_out", FINE)
        assert 0.998 * float(target) < epsilon <= float(target)
        for alarms, share in zip((0.01, 0.001), shares, strict=True):
            found = members_found(mechanisms, "zero_out", alarms)
            assert share == upward(100 * found, 3)


@pytest.mark.parametrize("alarms", [0.01, 0.001])
def test_a_scope_with_shares_is_bounded_by_what_proves_it(alarms):
    """Not below what it may release, and below what epsilon says."""
    sweep = PrivacyConfig(scope="sweep", num_shares=4, target_epsilon=2.0)
    order = renyi.best_order(2.0, sweep.target_delta)
    noise = math.sqrt(order / 2 / (2.0 - renyi.offset(order, sweep.target_delta)))
    best = PrivacyConfig(scope="selection", selection_reference=(1.0, 5.0, 1), target_epsilon=2.0)
    for privacy, gaussian in ((sweep, noise), (best, 5.0)):
        exact = norm.cdf(norm.ppf(alarms) + 1 / gaussian)
        assert exact < of_scope(privacy, alarms) < math.exp(2.0) * alarms + 1e-5
    assert of_scope(sweep.model_copy(update={"target_epsilon": 1e9}), alarms) == 1


def test_a_card_says_what_an_attack_on_trial_and_release_finds(tmp_path):
    config = load("core/configs/digits.yaml")
    plan = make_plan(config)
    terms = Terms("0" * 64, plan.num_examples, plan.delta, plan.neighboring_relation, None)
    ledger = Ledger.open(tmp_path, terms)
    ledger.reserve(Key("run", "a", "all", 0, plan.dp_sgd.num_steps), events_of(plan))

    def card() -> dict[str, str]:
        made = make_card(ledger, "run", plan, config.privacy, "a", "accuracy", searched=False)
        return made["attack"]

    alone = attack(plan.members_found)
    assert {*card().values()} == {alone}
    # A second trial of the run, and then a selection by another run.
    ledger.reserve(Key("run", "b", "all", 0, plan.dp_sgd.num_steps), events_of(plan))
    assert card()["epsilon_released_trial"] == alone
    twice = [(rate, noise, 2 * count) for rate, noise, count in plan.mechanisms]
    both = attack(lambda alarms: members_found(tuple(twice), "zero_out", alarms))
    assert card()["epsilon_released_with_selection"] == both != alone
    within = RunBudget(0.5, adaptive=False, selection="s")
    event = Event("central_images", 1.0, 9.0, 1)
    ledger.reserve(Key("best", "c", "all", 0, 0), (event,), within=within)
    every = ledger.members_found(1e-4)
    expected = members_found(tuple(twice), "zero_out", math.exp(0.5) * 1e-4) + plan.delta
    assert every == pytest.approx(expected)
