"""The best of a secret number of trials by privacy profiles: brute force, golden figures."""

import itertools
import math

import numpy as np
import pytest

from core.privacy.accounting import profile, renyi, selection
from core.privacy.accounting.quick import composed_losses, library_release, quick_epsilon

DELTA = 1e-5
LAWS = ("geometric", "logarithmic")
CENTRAL, RATE, STEPS = (0.1, 5.0, 5), 4096 / 60_000, 2197


def generating(law: str, mean: float, z: np.ndarray) -> np.ndarray:
    """E z^K (Papernot and Steinke 2022, definition 1)."""
    gamma = renyi.halting_probability(law, mean)
    if law == "geometric":
        return gamma * z / (1 - (1 - gamma) * z)
    return np.log1p(-(1 - gamma) * z) / math.log(gamma)


def best(p: np.ndarray, order: tuple[int, ...], law: str, mean: float) -> np.ndarray:
    """Exact law of the best of K outcomes, the last of `order` being the best."""
    at_most = np.minimum(np.cumsum(p[list(order)]), 1.0)
    released = np.empty_like(p)
    released[list(order)] = np.diff(generating(law, mean, at_most), prepend=0.0)
    return released


def stick(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    return float(np.clip(p - math.exp(epsilon) * q, 0, None).sum())


def profile_of(q: np.ndarray, p: np.ndarray, step: float, points: int) -> np.ndarray:
    grid = np.arange(points) * step
    return np.array([[stick(*pair, e) for e in grid] for pair in ((q, p), (p, q))])


def toys() -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of laws of few outcomes: Laplace-like, lopsided, and with impossible outcomes."""
    rng = np.random.default_rng(0)
    pairs = [rng.dirichlet(np.full(5, 0.7), 2) for _ in range(4)]
    pairs += [np.array(each) for each in (
        [[0.02, 0.38, 0.6, 0.0], [0.0, 0.4, 0.59, 0.01]],
        [[0.3, 0.3, 0.4], [0.0, 0.6, 0.4]],
        [[0.001, 0.999], [0.00001, 0.99999]],
        [[0.75, 0.25], [0.25, 0.75]],
    )]  # fmt: skip
    return [(q, p) for q, p in pairs]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("mean", [1.2, 4.0, 40.0])
def test_every_score_order_of_toy_mechanisms_stays_below_the_bound(law, mean):
    """Both directions at once, as the bound is for both; near it for some order, so it is tight."""
    phi, step = selection.derivative(law, mean), 0.05
    nearest = 0.0
    for q, p in toys():
        deltas = profile_of(q, p, step, 160)
        for epsilon in (0.0, 0.4, 1.0, 2.5):
            bound = selection.selection_delta(deltas, step, epsilon, phi)
            for order in itertools.permutations(range(len(q))):
                one, other = (best(each, order, law, mean) for each in (q, p))
                exact = max(stick(one, other, epsilon), stick(other, one, epsilon))
                assert exact <= bound + 1e-12
                nearest = max(nearest, exact / min(max(bound, 1e-9), 1.0))
    assert nearest > 0.75


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_the_larger_direction_counts(epsilon):
    q, p = np.array([0.01, 0.99]), np.array([0.0001, 0.9999])
    deltas = profile_of(q, p, 0.05, 160)
    phi = selection.derivative("geometric", 8.0)
    bound = selection.selection_delta(deltas, 0.05, epsilon, phi)
    assert bound == selection.selection_delta(deltas[::-1], 0.05, epsilon, phi)
    for order in ((0, 1), (1, 0)):
        one, other = (best(each, order, "geometric", 8.0) for each in (q, p))
        assert max(stick(one, other, epsilon), stick(other, one, epsilon)) <= bound


def test_one_trial_alone_has_its_own_epsilon():
    mechanisms = (CENTRAL, (RATE, 1.7601, STEPS))
    step = profile.profile_step(mechanisms)
    deltas = profile.profile(mechanisms, "zero_out", step)
    for place in (0, 1000, 3000, 6000, 8000):
        alone = selection.selection_delta(deltas, step, place * step, np.ones_like)
        assert alone == pytest.approx(deltas[:, place].max(), rel=2e-3)
    found = epsilon_of(deltas, step, np.ones_like)
    assert found == pytest.approx(quick_epsilon(mechanisms, DELTA, "zero_out", step), abs=1e-3)


def epsilon_of(deltas, step, phi) -> float:
    def excess(epsilon: float) -> float:
        return math.log(selection.selection_delta(deltas, step, epsilon, phi) / DELTA)

    return renyi.find_root(excess, 0.01, 40.0, xtol=1e-5)


@pytest.mark.parametrize(
    ("base", "law", "golden"),
    [
        (1.7601, "geometric", 14.62),
        (1.7601, "logarithmic", 13.77),
        (12.173, "geometric", 1.648),
        (12.173, "logarithmic", 1.531),
    ],
)
def test_the_best_of_sixteen_costs_the_golden_figures(base, law, golden):
    mechanisms = (CENTRAL, (RATE, base, STEPS))
    step = profile.profile_step(mechanisms)
    deltas = profile.profile(mechanisms, "zero_out", step)
    found = epsilon_of(deltas, step, selection.derivative(law, 16.0))
    assert found == pytest.approx(golden, rel=1e-3)


def worst_order(mechanisms, law: str, mean: float, step: float) -> float:
    """The largest epsilon of some orders of the outcomes: a lower bound on every theorem.

    From the worst score up: losses between two thresholds, those above the higher one, the rest;
    each from the largest loss down. So what has a large loss has the largest ratio of what lies
    below it.
    """
    way = composed_losses(mechanisms, "zero_out", step)[0]
    losses = (way.first + np.arange(len(way.probabilities)))[::-1] * step
    q = np.clip(way.probabilities[::-1], 0, None)
    p = q * np.exp(-losses)
    phi, found = selection.derivative(law, mean), 0.0
    tops = np.flatnonzero((np.cumsum(q) > 1e-5) & (np.cumsum(q) < 0.3))[::12]
    for top in tops:
        for bottom in np.flatnonzero((np.cumsum(p) > 1e-7) & (np.cumsum(q) < 1 - 1e-7))[::40]:
            if bottom <= top:
                continue
            order = np.r_[top:bottom, 0:top, bottom : len(q)]
            one, other = (
                each[order] * phi(np.clip(1 - np.cumsum(each[order]) + each[order] / 2, 0, 1))
                for each in (q, p)
            )
            if stick(one, other, found + 1e-3) <= DELTA:
                continue
            found = renyi.find_root(
                lambda e, one=one, other=other: stick(one, other, e) - DELTA, found, 40.0, xtol=1e-4
            )
    return found


@pytest.mark.parametrize(
    ("mechanisms", "law"),
    [
        ((CENTRAL, (RATE, 1.7601, STEPS)), "geometric"),
        ((CENTRAL, (RATE, 12.173, STEPS)), "geometric"),
        ((CENTRAL, (RATE, 12.173, STEPS)), "logarithmic"),
        (((1.0, 1.5, 1),), "geometric"),
    ],
)
def test_the_worst_order_comes_near_the_bound(mechanisms, law):
    step = 4 * profile.profile_step(mechanisms)
    deltas = profile.profile(mechanisms, "zero_out", step)
    bound = epsilon_of(deltas, step, selection.derivative(law, 16.0))
    assert bound - 0.1 < worst_order(mechanisms, law, 16.0, step) <= bound


def test_a_profile_is_that_of_the_library_in_both_directions():
    mechanisms, step = ((0.3, 1.2, 6), (1.0, 4.0, 2)), 2e-3
    deltas = profile.profile(mechanisms, "zero_out", step)
    one, other = (library_release(*each[:2], "zero_out", step) for each in mechanisms)
    total = one.self_compose(6).compose(other.self_compose(2))
    places = np.arange(0, deltas.shape[1], 97)
    for row, pmf in zip(deltas, (total._pmf_remove, total._pmf_add), strict=True):
        exact = np.array([pmf.get_delta_for_epsilon(place * step) for place in places])
        assert (row[places] >= exact - 1e-16).all()
        assert row[places] == pytest.approx(exact, rel=1e-6, abs=2e-13)
