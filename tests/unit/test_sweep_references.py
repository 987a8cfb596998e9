"""Scope `sweep` by references: brute force, the worst adversary, golden figures, refusals."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy.stats import norm
from test_best_of_trials import DELTA, RATE, STEPS
from test_ledger import CENTRAL as CENTRAL_EVENT
from test_ledger import DP_SGD, TERMS, counted
from test_plan import reference
from test_selection_shares import each_delta_decides, stays_below
from test_sweep_config import QUICKSTART, SWEEP
from test_tuning_shares import garbled_tree, nearest_below, toy

from core.config import Config, load, nested
from core.config.privacy import mechanisms_of
from core.errors import InfeasibleError
from core.privacy.accounting import profile, references, solve
from core.privacy.accounting.mechanism import grouped
from core.privacy.accounting.quick import composed, quick_epsilon
from core.privacy.ledger.admission import BudgetExceededError
from core.privacy.ledger.card import accountant_of
from core.privacy.ledger.ledger import Ledger
from core.privacy.ledger.terms import Key
from core.privacy.plan import shares
from core.privacy.plan.budget import RunBudget, run_budget
from core.privacy.plan.plan import make_plan, sweep_reference
from core.privacy.plan.scopes import share_of
from sweep.config.sweep import load_sweep

MNIST = "sweep/configs/mnist.yaml"


@cache
def capped(shares: int = 16, **settings: object) -> Config:
    """The reference setting as a trial of a sweep that has fixed the reference."""
    config = reference(privacy__scope="sweep", privacy__num_shares=shares, **settings)
    return load(nested(config), sweep_reference(config, []))


@cache
def share() -> shares.SweepShare:
    found = share_of(capped().privacy)
    assert isinstance(found, shares.SweepShare)
    return found


@pytest.mark.parametrize(
    ("total", "shares", "noise", "filtered"),
    [
        (10.0, 4, 3.2882, 3.5217),
        (10.0, 16, 6.4687, 6.9486),
        (1.0, 4, 25.466, 27.979),
        (1.0, 16, 66.006, 78.839),
    ],
)
def test_references_take_the_golden_noise_which_is_less_than_the_filter_s(
    total, shares, noise, filtered
):
    config = capped(shares, privacy__target_epsilon=total)
    plan = make_plan(config)
    assert plan.noise_multiplier == pytest.approx(noise, rel=1e-4)
    without = load(nested(config), {"privacy.tuning_reference": []})
    assert make_plan(without).noise_multiplier == pytest.approx(filtered, rel=1e-4)
    # All of them, composed at once: within the target, and not far within.
    every = grouped((rate, sigma, shares * count) for rate, sigma, count in plan.mechanisms)
    assert 0.9985 * total < quick_epsilon(every, DELTA, "zero_out", 1e-4 * total / 10) <= total


POINTS = (
    ((0.1, 20.0, 1), 2 * STEPS),
    ((0.1, 6.0, 40), STEPS),
    ((0.1, 3.0, 5), 440),
    ((1.0, 40.0, 1), 300),
)


@pytest.mark.parametrize(("central", "steps"), POINTS)
def test_a_trial_at_the_edge_stays_below_the_reference_at_every_epsilon(central, steps):
    problem = solve.Problem((central,), RATE, steps, 10.0, DELTA, "zero_out")
    mechanisms = problem.with_noise(noise := share().solve_noise_multiplier(problem))
    stays_below(share(), mechanisms, 0.7 * share().step)
    assert 0.9 < share().used(mechanisms) <= 1.0
    assert share().used(problem.with_noise(0.99 * noise)) > 1.0


def test_each_direction_and_every_epsilon_decide_alone():
    """A trial that exceeds the reference in one row or at one epsilon alone is refused."""
    each_delta_decides(share())


def test_the_tails_of_all_trials_are_within_what_is_kept_back():
    _, bound = shares._bound(share().reference, share().tail, share().step)
    assert bound[:, -1].max() <= (1 + shares._CUT) * share().tail
    tails = (1 + shares._CUT) * 16 * share().tail
    found = references.composed_delta(((share().reference, 16),), "zero_out", 10.0)
    alike = shares.SweepShare(10.0, DELTA, 16)
    assert alike.delta_of_all(share().reference, 10.0) == pytest.approx(found + tails, rel=1e-9)
    assert found + tails <= DELTA


def test_trials_of_one_reference_that_are_chosen_by_results_stay_below_its_copies():
    """Brute force: what is made of each trial depends on all outcomes of those before it."""
    rng, step, nearest = np.random.default_rng(7), 0.1, 0.0
    for _ in range(12):
        one = toy(rng, step)
        whole = composed([one[2]], [3], step)
        q, p = garbled_tree(rng, [one] * 3)
        nearest = max(nearest, nearest_below(whole, step, q, p))
    assert nearest > 0.5


def test_the_worst_adversary_over_two_trials_stays_within_the_target():
    """The second trial is the mechanism at the edge that is worst, given what the first gave away.

    The reference and the first are a Gaussian mechanism, so that this is one integral.
    """
    target, delta, points = 2.0, 1e-3, 4000
    alike = shares.SweepShare(target, delta, 2)

    def edge(bound: shares.SweepShare, rate: float, count: int) -> tuple[float, float, int]:
        problem = solve.Problem((), rate, count, target, delta, "zero_out")
        return rate, bound.solve_noise_multiplier(problem), count

    bound = replace(alike, reference=(edge(alike, 1.0, 1),))
    choices = [edge(bound, rate, count) for rate, count in ((1.0, 1), (0.3, 6), (0.05, 200))]
    step = profile.profile_step(bound.reference) / 4
    mu, x = 1 / choices[0][1], np.linspace(-9, 9, 20_001)
    losses, weights = mu * x + mu**2 / 2, norm.pdf(x) * (x[1] - x[0])  # x is centred at mu.
    given: list[np.ndarray] = []
    for each in choices:
        rows = profile.profile((each,), "zero_out", step, points)
        ratios, deltas = profile.hockey_sticks(*rows, step)
        given.append(np.interp(target - losses, np.log(ratios), deltas))
    fixed = [float(weights @ each) for each in given]
    worst = float(weights @ np.max(given, axis=0))
    assert max(fixed) < worst <= delta
    assert worst > 0.995 * delta


def test_what_one_reference_does_not_pay_for_is_refused():
    less = load(nested(capped()), {"privacy.target_epsilon": 9.9})
    more = load(nested(capped()), {"privacy.num_shares": 17})
    for refused in (less, more):
        with pytest.raises(InfeasibleError, match=r"trials like privacy\.tuning_reference release"):
            make_plan(refused)
    with pytest.raises(InfeasibleError, match="where PLD ends: leave it out"):
        make_plan(load(nested(capped()), {"privacy.target_delta": 1e-9}))
    dear = {"central_images.per_class": 50, "central_images.noise_multiplier": 1.0}
    with pytest.raises(InfeasibleError, match="its privacy profile leaves"):
        make_plan(load(nested(capped()), dear))


def test_a_sweep_fixes_the_reference_before_its_trials_and_says_what_bounds_them():
    sweep = load_sweep(MNIST, SWEEP)
    privacy = sweep.run.privacy
    score, dp_sgd = mechanisms_of(privacy.tuning_reference)
    assert score == (1.0, SWEEP["privacy.dp_accuracy_stddev"], 1)
    assert dp_sgd[2] == sweep.run.training.num_steps  # No easy stage, as the nearest to normal.
    found = share_of(privacy)
    assert (found.reference, found.trials) == ((score, dp_sgd), 4)
    for split, count in ((0.0, 1), (0.4, 8)):
        trial = sweep.trial_config({"stage_split": split, "central_images.per_class": count})
        assert share_of(trial.privacy) == found
        assert found.used(make_plan(trial).mechanisms) <= 1
    assert "Zhu, Dong and Wang 2022, theorem 10" in accountant_of(privacy, "")
    budget = run_budget(sweep.run)
    assert (budget.tuning_trials, budget.has_final_run) == (4, False)
    assert repr(dp_sgd[1]) in budget.references


@pytest.mark.parametrize(
    "changes",
    [
        {"num_trials": 6, "privacy.num_shares": 4},  # Some must be stopped, which a filter counts.
        {"privacy.target_delta": 1e-9},
    ],
)
def test_the_filter_stays_and_is_named_where_references_cannot_be(changes):
    privacy = load_sweep(MNIST, SWEEP | changes).run.privacy
    assert privacy.tuning_reference == ()
    assert accountant_of(privacy, "").startswith("Renyi DP at order")


def test_the_filter_stays_where_an_end_of_the_space_takes_less_noise_by_it():
    """Of the digits, few steps beside moments that spend nearly all."""
    sweep = load_sweep(QUICKSTART, SWEEP)
    assert sweep.run.privacy.tuning_reference == ()
    end = sweep.trial_config({"central_images.noise_multiplier": 0.6, "stage_split": 0.0})
    assert run_budget(end) == RunBudget(10.0, adaptive=True)


def test_samplers_that_do_not_learn_need_no_reference():
    drawn = load_sweep(MNIST, SWEEP | {"sampler": "random"}).run.privacy
    assert (drawn.tuning_reference, share_of(drawn)) == ((), None)


def test_the_ledger_charges_the_whole_and_admits_no_trial_more_than_was_composed(
    tmp_path,
):
    within = RunBudget(9.0, True, tuning_trials=2, references="each", has_final_run=False)
    ledger, events = Ledger.open(tmp_path, replace(TERMS, budget=10.0)), (CENTRAL_EVENT, DP_SGD)

    def key(trial: str, stage: str = "all") -> Key:
        return Key("capped", trial, stage, 0, DP_SGD.count)

    first = ledger.reserve(key("a"), events, within=within)
    assert counted(ledger) == ledger.epsilon_of_run("capped") == 9.0
    ledger.commit(first, 3)  # Stopped: the whole counts all the same.
    ledger.reserve(key("b"), events, within=within)
    for stage in ("all", "tuning", "final run"):
        with pytest.raises(BudgetExceededError, match=r"of run capped, whose .* pays for 2 trials"):
            ledger.reserve(key("c", stage), events, within=within)
    assert Ledger.at(ledger.path).epsilon_of_run("capped") == 9.0
