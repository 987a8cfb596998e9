"""Tuning trials and a final run by reference profiles: brute force, golden figures, every bound."""

import math
from functools import cache

import numpy as np
import pytest
from scipy.stats import norm
from test_best_of_trials import CENTRAL, DELTA, RATE, STEPS, stick
from test_plan import reference
from test_selection_shares import each_delta_decides, stays_below

from core.config import load, nested
from core.errors import ConfigError, InfeasibleError
from core.privacy.accounting import profile, references, solve
from core.privacy.accounting.mechanism import grouped
from core.privacy.accounting.quick import Losses, composed, composed_losses, quick_epsilon
from core.privacy.plan import shares
from core.privacy.plan.plan import (
    check_feasible,
    make_plan,
    resumed_plan,
    tuning_config,
    tuning_references,
)
from core.privacy.plan.scopes import share_of

TUNING = (CENTRAL, (RATE, 19.9, STEPS))
FINAL = (CENTRAL, (RATE, 1.85, STEPS))


def tuned(**settings: object):
    scope = {"privacy__scope": "tune_then_train", "privacy__num_shares": 16}
    return reference(**scope | settings)


@cache
def fixed(is_final: bool, **settings: object):
    """The reference setting as a trial of a sweep that has fixed both references."""
    config = tuned(**settings)
    found = tuning_references(tuning_config(config), config)
    return load(nested(config), {**found, "privacy.is_final_run": is_final})


@cache
def both_shares() -> list[shares.ProfileShare]:
    found = [share_of(fixed(is_final).privacy) for is_final in (False, True)]
    assert all(isinstance(share, shares.TuningShare) for share in found)
    return found


@pytest.mark.parametrize(
    ("settings", "tuning", "final"),
    [
        ({}, 19.9, 1.85),
        ({"privacy__num_shares": 8, "privacy__tuning_epsilon": 1.0}, 12.2, 1.878),
        (
            {
                "privacy__tuning_epsilon": None,
                "privacy__tuning_noise": 6.0,
                "privacy__tuning_steps": 0.25,
            },
            6.0,
            2.046,
        ),
    ],
)
def test_tuning_leaves_the_final_run_the_golden_noise(settings, tuning, final):
    """Of 16 trials at epsilon 0.60 it may be 1.85; without any it is 1.760."""
    config = fixed(True, **settings)
    plan = make_plan(config)
    assert plan.noise_multiplier == pytest.approx(final, rel=5e-4)
    if not settings:
        assert plan.noise_multiplier <= 1.85
    before = make_plan(tuning_config(load(nested(config), {"privacy.is_final_run": False})))
    assert before.noise_multiplier == pytest.approx(tuning, rel=2e-4)
    # All of them, composed at once: within the target, and not far within.
    times = config.privacy.num_shares
    tuned_by = [(rate, sigma, times * count) for rate, sigma, count in before.mechanisms]
    total = quick_epsilon(grouped([*tuned_by, *plan.mechanisms]), DELTA, "zero_out", 1e-4)
    assert 9.985 < total <= 10.0


def test_a_tuning_trial_spends_its_epsilon():
    plan = make_plan(fixed(False))
    assert 0.995 * 0.6 < plan.epsilon <= 0.6


def deltas_of(way: Losses, step: float, epsilons: np.ndarray) -> np.ndarray:
    losses = (way.first + np.arange(len(way.probabilities))) * step
    excess = np.clip(1 - np.exp(epsilons[:, None] - losses), 0, None)
    return way.infinite + excess @ way.probabilities


@pytest.mark.parametrize("mechanisms", [FINAL, TUNING, ((0.3, 1.2, 6), (1.0, 4.0, 2))])
def test_the_pair_that_is_composed_is_below_neither_direction(mechanisms):
    """At epsilons below 0 by the other direction, as seen from the other side."""
    step = profile.profile_step(mechanisms)
    ways = composed_losses(mechanisms, "zero_out", step)
    epsilons = np.arange(0, 1500, 31) * step
    for forth, back in (ways, ways[::-1]):
        pair = references._pair(forth, back, step)
        assert pair.probabilities.min() >= 0
        assert pair.probabilities.sum() + pair.infinite == pytest.approx(1.0, abs=1e-9)
        above = deltas_of(pair, step, epsilons)
        assert (above >= deltas_of(forth, step, epsilons) - 1e-12).all()
        below = 1 - np.exp(-epsilons) * (1 - deltas_of(back, step, epsilons))
        assert (deltas_of(pair, step, -epsilons) >= below - 1e-12).all()
        assert above == pytest.approx(deltas_of(forth, step, epsilons), rel=1e-3, abs=1e-9)


def toy(rng: np.random.Generator, step: float) -> tuple[np.ndarray, np.ndarray, Losses]:
    """Laws of few outcomes whose losses lie on the grid, with outcomes that one excludes."""
    places = rng.choice(np.arange(-9, 10), 4, replace=False)
    q = rng.dirichlet(np.ones(4)) * 0.97
    p = q * np.exp(-step * places)
    scale = min(1.0, 0.98 / p.sum())
    q, p = scale * q, scale * p
    losses = np.zeros(19)
    losses[places + 9] = q
    law = np.array([*q, 1 - q.sum(), 0.0]), np.array([*p, 0.0, 1 - p.sum()])
    return *law, Losses(-9, losses, 1 - q.sum())


def test_trials_that_are_chosen_by_results_stay_below_the_composed_references():
    """Brute force: which reference comes next, and what is made of it, depend on all outcomes."""
    rng, step, nearest = np.random.default_rng(3), 0.1, 0.0
    for _ in range(20):
        toys = [toy(rng, step) for _ in range(3)]
        whole = composed([losses for *_, losses in toys], [1] * 3, step)
        q, p = garbled_tree(rng, toys)
        nearest = max(nearest, nearest_below(whole, step, q, p))
    assert nearest > 0.5


def nearest_below(whole, step: float, q: np.ndarray, p: np.ndarray) -> float:
    """What part of the bound by `whole` a law of outcomes reaches, which must stay below it."""
    reached = 0.0
    for place in range(0, 25, 4):
        bound = deltas_of(whole, step, np.array([place * step]))[0]
        exact = stick(q, p, place * step)
        assert exact <= bound + 1e-12
        reached = max(reached, exact / bound)
    return reached


def garbled_tree(rng, toys) -> tuple[np.ndarray, np.ndarray]:
    """Law of all outcomes, on both data sets: of post-processed toys in an adaptive order."""
    if not toys:
        return np.ones(1), np.ones(1)
    place = int(rng.integers(len(toys)))
    q, p, _ = toys[place]
    others = [each for i, each in enumerate(toys) if i != place]
    kernel = rng.dirichlet(np.full(6, 0.05), 6) if rng.random() < 0.7 else np.eye(6)
    parts = [garbled_tree(rng, others) for _ in range(6)]
    return tuple(
        np.concatenate([mass * part[side] for mass, part in zip(law @ kernel, parts, strict=True)])
        for side, law in ((0, q), (1, p))
    )


POINTS = (
    (False, (0.1, 20.0, 1), 2 * STEPS),
    (False, (0.1, 6.9, 24), 440),
    (True, (0.1, 2.7, 15), 2 * STEPS),
    (True, (0.1, 1.05, 5), 440),
)


@pytest.mark.parametrize(("is_final", "central", "steps"), POINTS)
def test_a_trial_at_the_edge_stays_below_its_reference_at_every_epsilon(is_final, central, steps):
    share = both_shares()[is_final]
    problem = solve.Problem((central,), RATE, steps, 10.0, DELTA, "zero_out")
    mechanisms = problem.with_noise(noise := share.solve_noise_multiplier(problem))
    stays_below(share, mechanisms, 0.7 * share.step)
    assert 0.9 < share.used(mechanisms) <= 1.0
    assert share.used(problem.with_noise(0.99 * noise)) > 1.0


def test_each_direction_and_every_epsilon_decide_alone():
    """A trial that exceeds its reference in one row or at one epsilon alone is refused."""
    for share in both_shares():
        each_delta_decides(share)


def test_the_tails_of_all_references_are_within_what_is_kept_back():
    tuning, final = both_shares()
    # Each with what a trial may keep past the last point, where the profile itself ends.
    for share in (tuning, final):
        _, bound = shares._bound(share.reference, share.tail, share.step)
        assert bound[:, -1].max() <= (1 + shares._CUT) * share.tail
    tails = (1 + shares._CUT) * (16 * tuning.tail + final.tail)
    alike = shares.TuningShare(10.0, DELTA, 16, tuning.reference)
    found = ((tuning.reference, 16), (final.reference, 1))
    composed_delta = references.composed_delta(found, "zero_out", 10.0)
    assert alike.delta_of_all(final.reference, 10.0) == pytest.approx(
        composed_delta + tails, rel=1e-9
    )
    assert composed_delta + tails <= DELTA


@pytest.mark.parametrize("alarms", [0.01, 0.001])
def test_what_an_attack_finds_is_that_of_both_references_together(alarms):
    """Of Gaussian mechanisms, which compose to one, it is known."""
    tuning, final = ((1.0, 20.0, 1),), ((1.0, 2.0, 1),)
    share = shares.TuningShare(10.0, DELTA, 16, tuning, final, reference=final)
    together = math.sqrt(16 / 20.0**2 + 1 / 2.0**2)
    exact = norm.cdf(norm.ppf(alarms) + together)
    assert exact < share.members_found(alarms) < 1.05 * exact + DELTA
    tried = shares.TuningShare(10.0, DELTA, 16, tuning, final, False, tuning)
    assert tried.members_found(alarms) == share.members_found(alarms)


@pytest.mark.parametrize(("steps", "most"), [(1.6, 0.025), (0.3, 0.02)])
def test_the_cap_costs_little_noise(steps, most):
    for share in both_shares():
        epsilon = solve.epsilon_of_mechanisms(share.reference, DELTA, "zero_out", 1e-4)
        settings = ((CENTRAL,), RATE, round(steps * STEPS), epsilon, DELTA, "zero_out")
        alone = solve.estimated_noise_multiplier(solve.Problem(*settings))
        assert share.solve_noise_multiplier(solve.Problem(*settings)) <= (1 + most) * alone


def test_what_no_noise_brings_under_a_reference_is_refused_with_the_reason():
    dear = {"central_images.per_class": 40, "central_images.noise_multiplier": 4.0}
    with pytest.raises(InfeasibleError, match=r"central images take .* its privacy profile leaves"):
        check_feasible(load(nested(fixed(False)), dear))
    check_feasible(load(nested(fixed(True)), dear))
    dear = {"central_images.per_class": 45, "privacy.dp_accuracy_stddev": 8.0}
    with pytest.raises(InfeasibleError, match="profile that bounds every tuning trial"):
        check_feasible(load(nested(fixed(False)), dear))


def test_references_that_exceed_the_target_are_refused():
    less = load(nested(fixed(True)), {"privacy.target_epsilon": 9.9})
    for refused in (make_plan, check_feasible):
        with pytest.raises(InfeasibleError, match=r"trials like privacy\.final_reference release"):
            refused(less)
    more = load(nested(fixed(True)), {"privacy.num_shares": 17})
    with pytest.raises(InfeasibleError, match=r"privacy\.final_reference"):
        make_plan(more)


def test_a_kept_plan_beyond_its_reference_is_refused():
    final = fixed(True)
    tuning = load(nested(final), {"privacy.is_final_run": False})
    with pytest.raises(ConfigError, match="does not agree with the configuration in target"):
        resumed_plan(tuning, make_plan(final))


def test_a_tuning_trial_without_the_final_reference_is_refused():
    """Alone, it would take what all together have, and so would each that comes after it."""
    alone = load(nested(fixed(False)), {"privacy.final_reference": []})
    assert not alone.privacy.is_final_run
    with pytest.raises(ConfigError, match=r"a tuning trial needs privacy\.final_reference"):
        make_plan(alone)


def test_references_keep_their_own_grids():
    """A final run without central images needs a grid far finer than that of tuning trials."""
    tuning, final = (((1.0, 4.0, 1),), 16), (((RATE, 10_000.0, STEPS),), 1)
    coarse, fine = references.grids((tuning, final))
    assert coarse > 50 * fine
    assert max(len(way.probabilities) for way in references._copies(final, "zero_out", fine)) < 2e6
    # The tuning trials are one Gaussian mechanism of noise 1; the final run adds hardly any.
    exact = norm.cdf(-3.5) - math.exp(4) * norm.cdf(-4.5)
    assert exact < references.composed_delta((tuning, final), "zero_out", 4.0) < 1.01 * exact


def test_the_delta_of_one_direction_is_known_between_the_points_of_its_grid():
    """Randomized response that tells the truth or lies, 3 to 1, or names the record."""
    step = math.log(3)
    losses = references.Losses(-1, np.array([0.225, 0.0, 0.675]), 0.1)
    epsilons = np.array([-5.0, -1.5, -step, -0.3, 0.0, 0.4, step, 2.0])
    exact = [
        0.1 + max(0.675 - math.exp(each) * 0.225, 0) + max(0.225 - math.exp(each) * 0.675, 0)
        for each in epsilons
    ]
    assert profile.deltas_at(losses, step, epsilons) == pytest.approx(exact, abs=1e-15)


def test_what_is_not_proven_is_refused():
    with pytest.raises(ConfigError, match=r"proven for privacy\.neighboring_relation='zero_out'"):
        tuned(privacy__neighboring_relation="replace_one")
    with pytest.raises(InfeasibleError, match="where PLD proves 16 tuning trials"):
        make_plan(tuned(privacy__target_delta=1e-9))
    with pytest.raises(ConfigError, match="needs trials before its final run: start a sweep"):
        make_plan(tuned())
    with pytest.raises(ConfigError, match="say the same: give one of them"):
        tuned(privacy__tuning_noise=20.0)
    config = tuned(privacy__tuning_epsilon=0.1)
    with pytest.raises(InfeasibleError, match=r"raise privacy\.tuning_epsilon"):
        tuning_references(tuning_config(config), config)
