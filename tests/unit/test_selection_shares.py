"""Shares of a selection: what bounds each trial, what it costs, where it ends."""

import itertools
from functools import cache

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from test_best_of_trials import CENTRAL, DELTA, LAWS, RATE, STEPS, epsilon_of
from test_plan import reference

from core.config import PrivacyConfig
from core.errors import InfeasibleError
from core.privacy.accounting import profile, selection, solve
from core.privacy.accounting.mechanism import Mechanism
from core.privacy.accounting.quick import library_release
from core.privacy.plan import scopes, shares
from core.privacy.plan.plan import make_plan
from core.privacy.plan.plan import reference as reference_of
from core.privacy.plan.scopes import share_of


def selecting(**settings: object):
    return reference(privacy__scope="selection", **settings)


@pytest.mark.parametrize(
    ("total", "law", "golden"),
    [
        (10.0, "geometric", 2.385),
        (10.0, "logarithmic", 2.261),
        # On a grid of 1e-3, too coarse for them, these are 20.34 and 18.77.
        (1.0, "geometric", 19.98),
        (1.0, "logarithmic", 18.52),
    ],
)
def test_selection_asks_for_the_golden_noise(total, law, golden):
    plan = make_plan(selecting(privacy__target_epsilon=total, privacy__selection_law=law))
    assert plan.noise_multiplier == pytest.approx(golden, rel=2e-3)
    step, deltas = shares._bound(tuple(plan.mechanisms), shares._SLACK * DELTA / 16)
    assert 0.999 * total < epsilon_of(deltas, step, selection.derivative(law, 16.0)) <= total


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("mean", [1.5, 16.0, 300.0])
@pytest.mark.parametrize("total", [0.5, 3.0, 30.0])
def test_never_more_noise_than_renyi_dp_asks_for(law, mean, total):
    settings = {
        "privacy__selection_law": law,
        "privacy__selection_mean": mean,
        "privacy__target_epsilon": total,
    }
    config = selecting(**settings, stage_split=0.0)
    problem = solve.Problem((), RATE, STEPS, total, DELTA, "zero_out")
    by_renyi = scopes._selection_share(config.privacy).solve_noise_multiplier(problem)
    share = share_of(config.privacy)
    assert share is not None
    assert share.solve_noise_multiplier(problem) < by_renyi


def flat(mechanisms) -> tuple[float, ...]:
    return tuple(itertools.chain.from_iterable(mechanisms))


@cache
def capped() -> shares.SelectionShare:
    """The share of a trial whose reference is the reference setting."""
    found = reference_of(selecting())
    share = share_of(selecting(privacy__selection_reference=flat(found)).privacy)
    assert isinstance(share, shares.SelectionShare)
    return share


POINTS = (
    ((0.1, 5.0, 5), STEPS),
    ((0.1, 20.0, 1), 2 * STEPS),
    ((0.1, 2.7, 15), 2 * STEPS),
    ((0.1, 7.0, 50), 880),
    ((0.1, 1.0, 5), 440),
)


def stays_below(share: shares.ProfileShare, mechanisms: tuple[Mechanism, ...], fine: float) -> None:
    """By the library's own distributions on a finer grid, between points and below 0, too.

    Where a release hardly ever has a loss, the library rounds its probabilities up, and the mass of
    a composition comes to some millionths above 1. Below 0 its deltas hold all of that, and so
    exceed what they bound.
    """
    step, bound = shares._bound(share.reference, share.tail, share.step)
    assert fine < step
    total = privacy_loss_distribution.identity(fine)
    for rate, sigma, count in mechanisms:
        total = total.compose(library_release(rate, sigma, "zero_out", fine).self_compose(count))
    epsilons = np.arange(bound.shape[1]) * step
    rows = (total._pmf_remove, total._pmf_add)
    for row, other, pmf in ((0, 1, rows[0]), (1, 0, rows[1])):
        assert (np.array(pmf.get_delta_for_epsilon(epsilons)) <= bound[row]).all()
        below = 1 - np.exp(-epsilons) * (1 - bound[other])
        surplus = pmf._infinity_mass + pmf.to_dense_pmf()._probs.sum() - 1
        assert -1e-10 < surplus < 1e-5
        found = np.array(pmf.get_delta_for_epsilon(-epsilons[::-1]))[::-1]
        assert (found <= below + max(surplus, 0) + 1e-12).all()
    between = epsilons[:-1] + 0.37 * step  # Linear in exp(epsilon), and so above there, too.
    for row, pmf in enumerate(rows):
        there = np.interp(np.exp(between), np.exp(epsilons), bound[row])
        assert (np.array(pmf.get_delta_for_epsilon(between)) <= there).all()


@pytest.mark.parametrize(("central", "steps"), POINTS)
def test_a_trial_at_the_edge_stays_below_the_reference_at_every_epsilon(central, steps):
    share = capped()
    problem = solve.Problem((central,), RATE, steps, 10.0, DELTA, "zero_out")
    noise = share.solve_noise_multiplier(problem)
    stays_below(share, problem.with_noise(noise), 0.7 * profile.profile_step(share.reference))
    assert share.used(problem.with_noise(noise)) <= 1.0
    assert share.used(problem.with_noise(0.995 * noise)) > 1.0
    # What it may release at most is, selected, within the target.
    alike = shares.SelectionShare(10.0, DELTA, "logarithmic", 16.0)
    assert alike.used(problem.with_noise(noise)) <= 1.0


def test_each_direction_and_every_epsilon_decide_alone():
    """A trial that exceeds the reference in one row or at one epsilon alone is refused."""
    each_delta_decides(capped())


def each_delta_decides(share: shares.ProfileShare) -> None:
    _, bound = shares._bound(share.reference, share.tail, share.step)
    for row, place in itertools.product((0, 1), (0, 100, bound.shape[1] // 2, -1)):
        deltas = bound.copy()
        deltas[row, place] *= 1.01
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(profile, "profile", lambda *_, deltas=deltas: deltas)
            assert share.used(share.reference) == pytest.approx(1.01)


def test_the_cap_costs_the_reference_setting_little_noise():
    bounded, alike = capped(), share_of(selecting().privacy)
    for steps, most in ((2 * STEPS, 0.025), (1.6 * STEPS, 0.018), (0.4 * STEPS, 0.012)):
        problem = solve.Problem((CENTRAL,), RATE, round(steps), 10.0, DELTA, "zero_out")
        alone = alike.solve_noise_multiplier(problem)
        assert alone * 0.999 <= bounded.solve_noise_multiplier(problem) <= (1 + most) * alone


def test_what_no_noise_brings_under_the_reference_is_refused_with_the_reason():
    dear = selecting(
        privacy__selection_reference=flat(capped().reference),
        central_images__per_class=200,
        central_images__noise_multiplier=1.0,
    )
    with pytest.raises(
        InfeasibleError, match=r"central images take .* times the delta that selecting the best"
    ):
        make_plan(dear)
    problem = solve.Problem(((0.1, 1.0, 90),), RATE, STEPS, 10.0, DELTA, "zero_out")
    with pytest.raises(InfeasibleError, match="leave too little of the privacy profile that bound"):
        capped().solve_noise_multiplier(problem)


def test_a_reference_that_exceeds_the_target_is_refused():
    found = reference_of(selecting(privacy__target_epsilon=11.0))
    with pytest.raises(
        InfeasibleError, match=r"trials like privacy\.selection_reference release has"
    ):
        make_plan(selecting(privacy__selection_reference=flat(found)))


def test_beyond_what_profiles_prove_the_bound_is_named():
    profiles, by_renyi = selecting().privacy, selecting(privacy__target_delta=1e-9).privacy
    assert "PLD of the best of a secret" in share_of(profiles).accountant
    assert "Renyi DP at order" in share_of(by_renyi).accountant
    assert "theorem 2" in share_of(by_renyi).accountant
    far = PrivacyConfig(scope="selection", target_epsilon=1e5)
    assert share_of(far).epsilon == 300.0
