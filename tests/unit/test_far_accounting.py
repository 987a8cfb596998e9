"""Accounting far out: epsilons to 1e6, deltas to 1e-30, and what is named where PLD ends."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, special
from test_plan import reference

from core.__main__ import main
from core.config import load
from core.errors import InfeasibleError
from core.privacy.accounting import renyi, solve
from core.privacy.accounting.mechanism import FINE, LARGEST, Mechanism, least_delta, quick_grid
from core.privacy.accounting.quick import composed, composed_losses, quick_epsilon
from core.privacy.accounting.rounding import odds
from core.privacy.ledger.card import card_markdown, make_card
from core.privacy.ledger.ledger import Ledger, events_of
from core.privacy.ledger.terms import Key, Terms
from core.privacy.plan.compare import final_noise
from core.privacy.plan.plan import (
    PrivacyPlan,
    composed_epsilon,
    estimated_noise_multiplier,
    make_plan,
    resumed_plan,
)

DIGITS = "core/configs/digits.yaml"
RENYI = "Renyi DP (Mironov 2017), as PLD ends at epsilon 600 and, for so many releases, delta "


def analytic(distance: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism of so many deviations, in logs (Balle and Wang 2018)."""

    def excess(epsilon: float) -> float:
        above = special.log_ndtr(distance / 2 - epsilon / distance)
        below = epsilon + special.log_ndtr(-distance / 2 - epsilon / distance)
        return above + math.log1p(-math.exp(min(below - above, -1e-300))) - math.log(delta)

    return optimize.brentq(excess, 1e-12, distance**2 + 60 * distance, xtol=1e-13)


def figure(mechanisms: list[Mechanism], delta: float, relation: str = "zero_out") -> float:
    return solve.epsilon_of_mechanisms(tuple(mechanisms), delta, relation, FINE)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8, 1e-10, 1e-13, 1e-15, 1e-20, 1e-30])
@pytest.mark.parametrize("noise", [1e4, 100.0, 10.0, 1.0, 0.2, 0.035, 0.01, 1e-3])
@pytest.mark.parametrize("count", [1, 100, 10_000])
def test_without_sampling_the_figure_is_the_analytic_one_or_a_little_more(delta, noise, count):
    exact = analytic(math.sqrt(count) / noise, delta) if count / noise**2 > 1e-6 else 0.0
    began = time.process_time()
    found = figure([(1.0, noise, count)], delta)
    assert time.process_time() - began < 10
    by_renyi = delta < least_delta([(1.0, noise, count)]) or found > LARGEST
    assert found >= exact * (1 - 1e-3 if not by_renyi else 1)
    if exact > 1e-2:
        assert found <= exact * (1.3 if by_renyi else 1.01)


@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_small_epsilons_are_not_lost_on_the_grid(delta):
    for noise, count in ((1e3, 100), (1e4, 10_000), (1e4, 400)):
        exact = analytic(math.sqrt(count) / noise, delta)
        assert exact * (1 - 1e-3) <= figure([(1.0, noise, count)], delta) <= exact * 1.01


def test_where_pld_no_longer_resolves_delta_it_is_not_asked():
    """Its own figure is then too small: 6.90 for 6.92, 7.50 for 7.56, and in the end infinite."""
    from core.privacy.accounting.exact import exact_epsilon

    mechanism = [(1.0, 100.0, 10_000)]
    least = least_delta(mechanism)
    exact = analytic(1.0, least)
    assert exact_epsilon(mechanism, least, "zero_out", FINE) == pytest.approx(exact, rel=1e-3)
    below = analytic(1.0, 1e-13)
    assert exact_epsilon(mechanism, 1e-13, "zero_out", FINE) < 0.995 * below
    assert below <= figure(mechanism, 1e-13) <= 1.06 * below


@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.07, 0.5, 0.99])
@pytest.mark.parametrize("noise", [0.02, 0.06, 0.15, 0.3, 0.6, 1.5, 5.0, 40.0])
def test_the_bound_at_orders_below_2_is_no_less_than_the_divergence_and_near_it(rate, noise):
    for order in (1.003, 1.05, 1.3, 1.8, 1.99):
        # By quadrature, in deviations of N(0, noise^2); analytic, so that the error is tiny.
        step = min(0.1, noise / 4)
        x = np.arange(-13.0, order / noise + 13.0, step)
        ratio = (2 * noise * x - 1) / (2 * noise**2)
        log_power = order * np.logaddexp(math.log1p(-rate), math.log(rate) + ratio)
        log_mean = special.logsumexp(log_power - x**2 / 2) + math.log(step / math.sqrt(2 * math.pi))
        found = renyi.divergence([(rate, noise, 1)], order)
        true = log_mean / (order - 1)
        assert found >= true * (1 - 1e-6) - 1e-11
        if noise < 0.5 or rate < 0.1:
            assert found <= true * (1.06 if noise < 0.5 or noise > 3 else 1.2) + 1e-11
    assert renyi.divergence([(rate, noise, 1)], 2 - 1e-12) == pytest.approx(
        renyi.divergence([(rate, noise, 1)], 2), rel=1e-6
    )


@pytest.mark.parametrize(
    ("order", "golden"), [(1.001, 380.2346), (1.0865, 514.3715), (1.5, 3006.556)]
)
def test_the_bound_is_near_what_forty_digits_give(order, golden):
    assert 1.0 <= renyi.divergence([(0.07, 0.3, 2_000)], order) / golden < 1.005


SETTINGS = {
    "many steps": {},
    "few steps": {"training__num_steps": 4},
    "full batch": {"private_training__expected_batch_size": 60_000, "training__num_steps": 20},
    "tiny rate": {"private_training__expected_batch_size": 6},
    "all releases": {"method": "feta_pro", "privacy__dp_accuracy_stddev": 50.0},
    "no easy stage": {"stage_split": 0.0},
    "sweep": {"privacy__scope": "sweep", "privacy__num_shares": 4},
    "fixed sweep": {
        "privacy__scope": "sweep",
        "privacy__num_shares": 4,
        "privacy__adaptive": False,
    },
    "selection": {"privacy__scope": "selection"},
}
AT_1E_5 = (300.0, 700.0, 1_500.0, 1e6)
DELTAS = (1e-14, 1e-15, 1e-30)
TARGETS = [*((epsilon, 1e-5) for epsilon in AT_1E_5), *((30.0, delta) for delta in DELTAS)]


@pytest.mark.parametrize("name", list(SETTINGS))
def test_any_target_is_planned_in_seconds_spent_and_kept(name):
    noises = []
    for epsilon, delta in TARGETS:
        settings = {"privacy__target_epsilon": epsilon, "privacy__target_delta": delta}
        config = reference(**(SETTINGS[name] | settings))
        began = time.process_time()
        plan = make_plan(config)
        again = PrivacyPlan.restored(json.loads(json.dumps(plan.summary())))
        assert resumed_plan(config, again) == plan
        four = composed_epsilon([plan] * 4)
        assert time.process_time() - began < 10
        spent = {"fixed sweep": four}.get(name, plan.epsilon)
        if name not in ("sweep", "selection"):  # There the share is spent: see test_scopes.
            assert spent <= epsilon
            # PLD at its end may ask for less noise than Renyi DP beyond it: then that is kept.
            assert spent >= (0.99 if epsilon != 700.0 else 600 / 701) * epsilon
        assert math.isfinite(four)
        assert four > plan.epsilon
        assert plan.epsilon >= max(plan.epsilon_central, plan.epsilon_frequency)
        by_renyi = plan.epsilon > LARGEST or delta < least_delta(plan.mechanisms)
        named = plan.summary()["accountant"]
        assert named.startswith(RENYI if by_renyi else "PLD, dp-accounting ")
        if by_renyi:
            assert plan.epsilon == pytest.approx(renyi.epsilon(plan.mechanisms, delta), rel=1e-12)
        estimate = estimated_noise_multiplier(config)
        assert estimate == pytest.approx(plan.noise_multiplier, rel=6e-3)
        noises.append(plan.noise_multiplier)
    at_1e_5, by_delta = noises[: len(AT_1E_5)], noises[len(AT_1E_5) :]
    assert at_1e_5 == sorted(at_1e_5, reverse=True)  # More epsilon, less noise.
    assert by_delta == sorted(by_delta)  # Less delta, more.


def test_a_kept_plan_whose_epsilon_renyi_dp_exceeds_many_times_is_taken():
    config = reference(private_training__expected_batch_size=6, privacy__target_epsilon=1.0)
    plan = make_plan(config)
    assert renyi.epsilon(plan.mechanisms, plan.delta) > 3
    assert resumed_plan(config, plan) is plan


@pytest.mark.parametrize(
    ("epsilon", "delta", "limit"),
    [(601.0, 1e-5, "600"), (1e6, 1e-5, "600"), (9.0, 1e-14, "2.3e-11")],
)
def test_replacing_a_record_is_refused_beyond_pld_with_its_limits(epsilon, delta, limit):
    config = reference(
        privacy__neighboring_relation="replace_one",
        privacy__target_epsilon=epsilon,
        privacy__target_delta=delta,
    )
    for ask in (make_plan, estimated_noise_multiplier):
        with pytest.raises(InfeasibleError, match=f"out of reach of PLD, which ends at .*{limit}"):
            ask(config)


def test_sixteen_trials_of_either_relation_come_to_a_finite_figure():
    for relation, least in (("zero_out", 873.0), ("replace_one", 900.0)):
        plan = make_plan(
            reference(privacy__target_epsilon=100.0, privacy__neighboring_relation=relation)
        )
        together = composed_epsilon([plan] * 16)
        assert least < together < 16 * 100
        mechanisms = [(rate, noise, 16 * count) for rate, noise, count in plan.mechanisms]
        quick = solve.epsilon_of_mechanisms(
            tuple(mechanisms), 1e-5, relation, quick_grid(mechanisms)
        )
        assert quick == pytest.approx(together, rel=2e-3)


def test_replacing_costs_what_the_gaussian_of_twice_the_distance_does():
    """No sampling: a figure above PLD's end for the other relation, which has no second bound."""
    found = figure([(1.0, 0.06, 1)], 1e-5, "replace_one")
    assert analytic(2 / 0.06, 1e-5) <= found <= analytic(2 / 0.06, 1e-5) + 2
    assert solve.accountant_of(found, [(1.0, 0.06, 1)], 1e-5, "replace_one").startswith("PLD")


def test_the_ledger_and_the_card_name_renyi_dp(tmp_path: Path):
    config = reference(privacy__target_epsilon=100.0)
    plan = make_plan(config)
    terms = Terms("0" * 64, plan.num_examples, plan.delta, plan.neighboring_relation, 1e5)
    ledger = Ledger.open(tmp_path, terms)
    for trial in range(16):
        ledger.reserve(Key("run", str(trial), "all", 0, plan.dp_sgd.num_steps), events_of(plan))
    summary = ledger.summary()
    total = summary["epsilon_committed_and_reserved"]
    mechanisms = [(rate, noise, 16 * count) for rate, noise, count in plan.mechanisms]
    assert total == ledger.epsilon_of_run("run") == renyi.epsilon(mechanisms, plan.delta)
    assert summary["accountant"].startswith(RENYI)
    assert [entry["epsilon"] for entry in summary["entries"]] == pytest.approx([plan.epsilon] * 16)
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    said = [line["accountant"] for line in lines if "epsilon_after" in line]
    assert said[0].startswith("PLD, ")
    assert said[-1].startswith(RENYI)
    card = make_card(ledger, "run", plan, config.privacy, "0", "accuracy", searched=True)
    assert card["accountant"] == card["accountant_of_the_scope"] == summary["accountant"]
    assert "e^" in card["odds"]["epsilon_released_with_selection"]
    assert RENYI in card_markdown(card)


def test_any_epsilon_has_its_odds():
    assert "at most 2.72 times" in odds(1.0)
    assert "at most 22,027 times" in odds(10.0)
    assert "at most e^1e+06 times" in odds(1e6)
    assert "at most e^inf times" in odds(math.inf)


def test_a_bound_that_takes_all_is_refused_with_the_reason():
    settings = {"privacy__scope": "sweep", "privacy__num_shares": 4, "stage_split": 0.0}
    with pytest.raises(
        InfeasibleError, match=r"adaptively chosen trials takes all of epsilon 0\.003"
    ):
        make_plan(reference(privacy__target_epsilon=0.003, **settings))


def test_a_target_that_dp_sgd_alone_cannot_keep_blames_no_other_release():
    with pytest.raises(InfeasibleError, match=r"epsilon 1e-06 is too little for DP-SGD, .* 10000"):
        make_plan(reference(privacy__target_epsilon=1e-6, stage_split=0.0))
    with pytest.raises(InfeasibleError, match=r"would fall below 0\.0001.* lower privacy\.target"):
        make_plan(reference(privacy__target_epsilon=1e12, stage_split=0.0))


@pytest.mark.parametrize("scope", ["trial", "sweep"])
@pytest.mark.parametrize(
    ("method", "title"), [("moments", "moments"), ("dp_merf", "frequency features")]
)
def test_a_refusal_of_a_method_without_training_speaks_of_what_it_releases(scope, method, title):
    settings = {"method": method, "privacy__scope": scope}
    with pytest.raises(InfeasibleError, match=f"of {title} would fall below 0"):
        make_plan(reference(privacy__target_epsilon=1e12, **settings))
    score = {"privacy__dp_accuracy_stddev": 1.0}
    with pytest.raises(
        InfeasibleError,
        match=rf"leave too little of .* for {title}, .*: raise privacy\.dp_accuracy_stddev \(1\)$",
    ):
        make_plan(reference(privacy__target_epsilon=2.5, **settings, **score))


@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
def test_what_has_no_loss_that_the_grid_holds_stays_infinite_composed_again(relation):
    for one_way in composed_losses([(1.0, 0.02, 2)], relation, 0.1):
        assert one_way.infinite == 1
        assert composed([one_way, one_way], [1, 3], 0.1).infinite == 1
    assert quick_epsilon([(1.0, 0.02, 2)], 1e-5, relation, 0.1) == math.inf


@pytest.mark.parametrize(("scope", "least"), [("sweep", 0.5), ("selection", 0.2)])
def test_other_scopes_answer_for_a_target_beyond_pld(scope, least):
    shares = {"num_shares": 16, "adaptive": True} if scope == "sweep" else {}
    config = load(DIGITS, {"privacy.target_epsilon": 1100})
    assert least < final_noise(config, scope, **shares) < 2 * least


@pytest.mark.parametrize("target", [300.0, 700.0])
def test_all_scopes_are_compared_far_out_in_seconds(target, capsys):
    began = time.process_time()
    main(["account", "--config", "core/configs/digits.yaml", f"privacy.target_epsilon={target}"])
    assert time.process_time() - began < 15
    assert "tune_then_train" in capsys.readouterr().out
