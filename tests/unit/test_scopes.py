"""Shares, filters and selection against independent figures, and what each scope refuses."""

import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from by_library import dp_events, subsampled_gaussian
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant
from dp_accounting.rdp import rdp_privacy_accountant
from test_plan import reference

from core.config import PrivacyConfig, load
from core.config.scopes import SCOPES
from core.errors import ConfigError, InfeasibleError
from core.privacy.accounting import renyi, solve
from core.privacy.accounting.mechanism import COARSE, grouped
from core.privacy.accounting.quick import LIBRARY_RELATIONS
from core.privacy.plan.budget import RunBudget, run_budget
from core.privacy.plan.plan import estimated_noise_multiplier, make_plan
from core.privacy.plan.scopes import share_of
from core.privacy.plan.shares import RenyiShare

DELTA = 1e-5
MECHANISMS = [(0.1, 5.0, 5), (0.07, 1.76, 2197), (1.0, 50.0, 1), (0.5, 0.5, 3), (0.001, 90.0, 9)]


def accountant(*events: dp_event.DpEvent) -> rdp_privacy_accountant.RdpAccountant:
    relation = LIBRARY_RELATIONS["zero_out"]
    one = rdp_privacy_accountant.RdpAccountant(renyi.ORDERS, relation)
    for event in events:
        one.compose(event)
    return one


def test_divergence_and_conversion_are_those_of_the_library():
    events = dp_events(MECHANISMS)
    for mechanism, event in zip(MECHANISMS, events, strict=True):
        expected = accountant(event).get_epsilon(DELTA)
        assert renyi.epsilon([mechanism], DELTA) == pytest.approx(expected, rel=1e-9)
    assert renyi.epsilon(MECHANISMS, DELTA) == pytest.approx(
        accountant(*events).get_epsilon(DELTA), rel=1e-9
    )


@pytest.mark.parametrize("law", ["geometric", "logarithmic"])
@pytest.mark.parametrize("mean", [1.5, 16.0, 300.0])
def test_selection_is_that_of_the_library_at_the_best_orders(law, mean):
    mechanisms = MECHANISMS[:2]
    inner = dp_event.ComposedDpEvent(dp_events(mechanisms))
    event = dp_event.RepeatAndSelectDpEvent(inner, mean, renyi.SHAPES[law])
    orders = renyi.ORDERS[:40]
    ours = min(
        renyi.selection_epsilon(
            (renyi.divergence(mechanisms, one), renyi.divergence(mechanisms, other)),
            (one, other),
            law,
            mean,
            DELTA,
        )
        for one in orders
        for other in orders
    )
    assert ours == pytest.approx(accountant(event).get_epsilon(DELTA), rel=1e-6)


@pytest.mark.parametrize(
    ("base", "law", "golden"),
    [
        (1.0, "logarithmic", 2.00),
        (1.0, "geometric", 2.45),
        (10.0, "logarithmic", 15.9),
        (10.0, "geometric", 17.5),
    ],
)
def test_selecting_among_sixteen_costs_the_golden_figures(base, law, golden):
    plan = make_plan(reference(privacy__target_epsilon=base))
    event = dp_event.RepeatAndSelectDpEvent(
        dp_event.ComposedDpEvent(dp_events(plan.mechanisms)), 16.0, renyi.SHAPES[law]
    )
    with_fractions = rdp_privacy_accountant.RdpAccountant(
        neighboring_relation=LIBRARY_RELATIONS["zero_out"]
    )
    with_fractions.compose(event)
    assert with_fractions.get_epsilon(DELTA) == pytest.approx(golden, rel=5e-3)
    assert accountant(event).get_epsilon(DELTA) >= with_fractions.get_epsilon(DELTA) - 1e-9


def test_every_scope_is_an_entry_of_the_one_table():
    named = PrivacyConfig.model_fields["scope"].annotation
    assert set(get_args(named)) == set(SCOPES)
    for scope in SCOPES.values():  # Proven for adaptive choices, or no trial has a share of it.
        assert bool(scope.theorem) == scope.covers_choice


def test_the_readme_s_table_of_ways_to_search_is_that_of_the_code():
    readme = Path("core/privacy/README.md").read_text()
    ways = [*SCOPES["trial"].ways]
    names = " | ".join(f"`{way}`" for way in ways)
    lines = [f"| scope | {names} |", "|" + " --- |" * (1 + len(ways))]
    for name, scope in SCOPES.items():
        assert [*scope.ways] == ways
        lines.append(f"| `{name}` | {' | '.join(scope.ways.values())} |")
    assert "\n".join(lines) + "\n" in readme
    alike = (SCOPES[name].refusal("replace_one") for name in ("tune_then_train", "selection"))
    assert all(alike)


@pytest.mark.parametrize(
    ("total", "runs", "golden"),
    [(10.0, 2, 2.38), (10.0, 8, 4.59), (10.0, 16, 6.45), (1.0, 4, 24.27), (1.0, 16, 48.51)],
)
def test_noise_for_the_work_of_several_runs_is_golden(total, runs, golden):
    """One release of central images, and the DP-SGD steps of `runs` trials.

    A grid of 1e-3 is too coarse for the small steps at epsilon 1: it asks for 24.5 and 50.7.
    """
    central, steps = (0.1, 5.0, 5), (4096 / 60_000, 2197 * runs)
    problem = solve.Problem((central,), *steps, total, DELTA, "zero_out")
    found = solve.estimated_noise_multiplier(problem)
    assert found == pytest.approx(golden, rel=3e-3)
    accountant = pld_privacy_accountant.PLDAccountant(LIBRARY_RELATIONS["zero_out"], 3e-5)
    for rate, noise, count in (central, (steps[0], found, steps[1])):
        accountant.compose(subsampled_gaussian(rate, noise, count))
    assert accountant.get_epsilon(DELTA) == pytest.approx(total, rel=3e-3)


@pytest.mark.parametrize("shares", [1, 4, 16])
def test_a_share_filled_by_any_trials_adds_up_to_the_target_and_not_more(shares):
    settings = {"privacy__scope": "sweep", "privacy__num_shares": shares}
    points = ((5, 5.0, 0.5), (1, 1.5, 0.2), (20, 9.0, 0.8), (1, 5.0, 0.0))
    plans = [
        make_plan(
            reference(
                **settings,
                central_images__per_class=count,
                central_images__noise_multiplier=noise,
                stage_split=split,
            )
        )
        for count, noise, split in points
    ]
    budget = run_budget(reference(**settings))
    assert budget == RunBudget(10.0, adaptive=True)
    for i in range(len(plans)):
        released = [m for j in range(shares) for m in plans[(i + j) % len(plans)].mechanisms]
        total = budget.total(released, released, DELTA, "zero_out")
        assert 9.99 < total <= 10.0
        # Any order is a bound for what was fixed beforehand, so PLD must stay below.
        composed = solve.epsilon_of_mechanisms(grouped(released), DELTA, "zero_out", COARSE)
        assert composed < total
        more = [*released, plans[0].mechanisms[-1]]
        assert budget.total(more, more, DELTA, "zero_out") > 10.0


def test_without_adaptation_all_that_was_reserved_counts_by_pld():
    settings = {"privacy__scope": "sweep", "privacy__num_shares": 4, "privacy__adaptive": False}
    plan = make_plan(reference(**settings))
    budget = run_budget(reference(**settings))
    assert budget == RunBudget(10.0, adaptive=False)
    four = plan.mechanisms * 4
    assert 9.98 < budget.total([], four, DELTA, "zero_out") <= 10.0
    points = ((5, 5.0, 0.5), (1, 1.5, 0.2), (20, 9.0, 0.8), (1, 5.0, 0.0))
    mixed = [
        mechanism
        for count, noise, split in points
        for mechanism in make_plan(
            reference(
                **settings,
                central_images__per_class=count,
                central_images__noise_multiplier=noise,
                stage_split=split,
            )
        ).mechanisms
    ]
    assert 9.9 < budget.total([], mixed, DELTA, "zero_out") <= 10.0
    adaptive = make_plan(reference(privacy__scope="sweep", privacy__num_shares=4))
    assert plan.noise_multiplier < adaptive.noise_multiplier


def test_a_share_of_a_selection_by_renyi_dp_keeps_the_bound_at_its_orders():
    settings = {"privacy__scope": "selection", "privacy__target_delta": 1e-9}
    config = reference(**settings, privacy__dp_accuracy_stddev=50.0)
    share, plan = share_of(config.privacy), make_plan(config)
    assert isinstance(share, RenyiShare)
    assert 0.999 < share.used(plan.mechanisms) <= 1.0
    caps = [order * share.mu**2 / 2 for order in share.orders]
    total = renyi.selection_epsilon((caps[0], caps[1]), share.orders, "logarithmic", 16.0, 1e-9)
    assert total == pytest.approx(10.0, rel=1e-9)
    assert plan.mechanisms[-1] == (1.0, 50.0, 1)
    assert make_plan(reference(**settings)).noise_multiplier < plan.noise_multiplier


def test_a_private_score_is_charged_what_the_specification_says():
    for total, cost in ((1.0, 0.003), (10.0, 0.0006)):
        plan = make_plan(reference(privacy__target_epsilon=total, privacy__dp_accuracy_stddev=50.0))
        assert plan.epsilon_score == pytest.approx(cost, rel=0.1)
        assert plan.epsilon <= total
        assert plan.tag("dp_accuracy").startswith("dp(epsilon +")
        assert plan.tag("accuracy") == "non-private"


def test_scores_on_public_data_are_public():
    assert make_plan(reference(dataset__public=True)).tag("fid") == "public"


def test_an_estimate_is_close_to_what_a_plan_solves():
    for settings in ({}, {"central_images__per_class": 50, "privacy__target_epsilon": 1.0}):
        config = reference(**settings)
        exact = make_plan(config).noise_multiplier
        assert estimated_noise_multiplier(config) == pytest.approx(exact, rel=4e-3)


def test_what_exceeds_the_share_is_refused_with_the_reason():
    dear = reference(
        privacy__scope="sweep",
        privacy__num_shares=16,
        privacy__target_epsilon=1.0,
        central_images__per_class=60,
    )
    with pytest.raises(InfeasibleError, match=r"central images take .* times the trial's share"):
        make_plan(dear)
    small = reference(
        privacy__scope="selection", privacy__target_epsilon=0.001, privacy__target_delta=1e-9
    )
    with pytest.raises(InfeasibleError, match="selecting among 16 trials on average takes all"):
        make_plan(small)


def test_what_no_theorem_covers_is_refused():
    for scope in ("sweep", "tune_then_train", "selection"):
        with pytest.raises(
            ConfigError, match=r"proven for privacy\.neighboring_relation='zero_out'"
        ):
            reference(privacy__scope=scope, privacy__neighboring_relation="replace_one")
    with pytest.raises(ConfigError, match="would change the law of their secret number"):
        reference(privacy__scope="selection", privacy__data_set_budget=20.0)
    with pytest.raises(ConfigError, match=r"privacy.scope='whole'.*one of 'trial', 'sweep'"):
        load({}, {"privacy.scope": "whole"})


def test_the_filters_order_depends_on_public_numbers_alone():
    room = [(10.0 - renyi.offset(order, DELTA)) / order for order in renyi.ORDERS]
    assert renyi.best_order(10.0, DELTA) == renyi.ORDERS[int(np.argmax(room))]
    share = share_of(reference(privacy__scope="sweep", privacy__num_shares=4).privacy)
    assert share is not None
    whole = share_of(reference(privacy__scope="sweep").privacy)
    assert whole is not None
    assert whole.mu / share.mu == pytest.approx(math.sqrt(4))
