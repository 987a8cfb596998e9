"""The plan's numbers against what the releases do, and its epsilon against the library's own."""

import dataclasses

import dp_accounting
import pytest
import torch
from by_library import dp_events, epsilon_of, rdp_epsilon_of, subsampled_gaussian
from dp_accounting import dp_event, pld, rdp
from dp_accounting.pld import privacy_loss_distribution
from opacus.accountants import PRVAccountant
from test_plan import reference

from core.config import load
from core.privacy.accounting import renyi, solve
from core.privacy.accounting.mechanism import grouped
from core.privacy.mechanisms.central_images import class_sums, down_scaled
from core.privacy.plan.plan import composed_epsilon, make_plan

SMALL = {
    "dataset.num_examples": 1_000,
    "dataset.image_size": 8,
    "central_images.per_class": 4,
    "central_images.noise_multiplier": 4.0,
    "central_images.expected_batch_size": 200,
    "central_images.image_size": 5,
    "private_training.expected_batch_size": 50,
    "private_training.max_grad_norm": 0.25,
    "training.num_steps": 24,
    "stage_split": 0.25,
    "privacy.target_epsilon": 1.0,
    "privacy.target_delta": 1e-4,
}


@pytest.mark.parametrize("kind", ["mean", "mode"])
@pytest.mark.parametrize("center", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_sensitivity_is_the_most_that_a_record_can_move_the_sums(kind, center, channels):
    changes = {
        "central_images.kind": kind,
        "central_images.pixel_center": center,
        "dataset.channels": channels,
    }
    config = load({}, SMALL | changes)
    plan = make_plan(config).central
    assert plan is not None
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    small = down_scaled(extremes.repeat(1, channels, 8, 8), config.central_images)
    moved = [
        class_sums(small[i : i + 1], torch.tensor([i]), 2, config.central_images).norm().item()
        for i in (0, 1)
    ]
    assert max(moved) == pytest.approx(plan.sensitivity, rel=1e-5)
    assert plan.noise_stddev == pytest.approx(4.0 * max(moved), rel=1e-5)


RELATIONS = {
    "zero_out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}


@pytest.mark.parametrize(("relation", "delta"), [("zero_out", 1e-7), ("replace_one", 1e-4)])
def test_epsilon_is_that_of_everything_that_runs(relation, delta):
    """Composed here by hand from the configuration, without the project's accounting."""
    settings = {"privacy.neighboring_relation": relation, "privacy.target_delta": delta}
    plan = make_plan(load({}, SMALL | settings))

    def epsilon(accountant, noise_multiplier: float, releases: int = 4, steps: int = 18) -> float:
        for rate, sigma, count in ((0.2, 4.0, releases), (0.05, noise_multiplier, steps)):
            event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
            accountant.compose(event, count)
        return accountant.get_epsilon(delta)

    def by_pld(noise_multiplier: float, grid: float = 1e-3, **changes: int) -> float:
        return epsilon(pld.PLDAccountant(RELATIONS[relation], grid), noise_multiplier, **changes)

    sigma = plan.noise_multiplier
    assert plan.epsilon == pytest.approx(by_pld(sigma, 1e-4), rel=1e-6)
    assert 0.99 < plan.epsilon <= 1.0
    if relation == "zero_out":  # The library's RDP knows no other for Poisson samples.
        by_rdp = epsilon(rdp.RdpAccountant(renyi.ORDERS, RELATIONS[relation]), sigma)
        assert by_rdp == pytest.approx(rdp_epsilon_of(dp_events(plan.mechanisms), delta, relation))
        assert 1.0 <= by_rdp <= 1.6
    assert by_pld(sigma) == pytest.approx(1.0, rel=5e-3)  # The coarse grid tells these apart:
    assert by_pld(0.97 * sigma) > 1.01
    for changes in ({"steps": 20}, {"releases": 6}):
        assert by_pld(sigma, **changes) > 1.01


def test_plan_and_configuration_agree_on_every_number():
    plan = make_plan(load({}, SMALL))
    assert plan.central is not None
    assert dataclasses.astuple(plan.dp_sgd) == (18, 0.05, plan.noise_multiplier, 0.25, 50)
    assert plan.dp_sgd.noise_stddev == plan.noise_multiplier * 0.25
    assert dataclasses.astuple(plan.central) == (4, 0.2, 4.0, 5.0, 20.0)
    alone = epsilon_of(dp_events(plan.mechanisms[:1]), 1e-4, "zero_out")
    assert plan.epsilon_central == pytest.approx(alone)


def test_a_sweep_pays_for_the_central_images_of_every_trial():
    plan = make_plan(load({}, SMALL))
    without = dataclasses.replace(plan, central=None)
    both = composed_epsilon([plan, plan])
    assert both > 1.02 * composed_epsilon([without, without])
    twice = epsilon_of(dp_events(plan.mechanisms * 2), 1e-4, "zero_out")
    assert both == pytest.approx(twice, rel=5e-3)


@pytest.mark.parametrize(("relation", "distance"), [("zero_out", 1.0), ("replace_one", 2.0)])
def test_two_records_of_the_bounded_norm_are_up_to_twice_it_apart(relation, distance):
    """Without subsampling, replacing one record by any other moves a sum by up to 2 S."""
    found = epsilon_of([subsampled_gaussian(1.0, 3.0, 1)], 1e-5, relation)
    exact = privacy_loss_distribution.from_gaussian_mechanism(3.0, sensitivity=distance)
    assert found == pytest.approx(exact.get_epsilon_for_delta(1e-5), rel=1e-3)


@pytest.mark.parametrize("relation", list(RELATIONS))
def test_many_mechanisms_compose_as_in_the_library(relation):
    many = (*((0.2, 3.0 + i, 2 + i) for i in range(6)), (1.0, 6.0, 1))
    accountant = pld.PLDAccountant(RELATIONS[relation], 1e-3)
    for rate, sigma, count in many:
        event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
        accountant.compose(event, count)
    found = solve.epsilon_of_mechanisms(many, 1e-5, relation, 1e-3)
    assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)
    parts = [(rate, sigma, 1) for rate, sigma, count in many for _ in range(count)]
    assert grouped(parts) == many


@pytest.mark.parametrize(("epsilon", "per_class"), [(1.0, 50), (10.0, 5)])
def test_another_accountant_agrees(epsilon, per_class):
    """PRV (Gopi et al. 2021), from Opacus: written apart from the PLD accountant of record."""
    plan = make_plan(
        reference(privacy__target_epsilon=epsilon, central_images__per_class=per_class)
    )
    prv = PRVAccountant()
    for rate, noise_multiplier, count in plan.mechanisms:
        prv.history.append((noise_multiplier, rate, count))
    found = prv.get_epsilon(plan.delta, eps_error=0.01, delta_error=plan.delta / 1000)
    assert found == pytest.approx(plan.epsilon, abs=0.03)
    prv.history[-1] = (0.98 * plan.noise_multiplier, *prv.history[-1][1:])
    wrong = prv.get_epsilon(plan.delta, eps_error=0.01, delta_error=plan.delta / 1000)
    assert abs(wrong - plan.epsilon) > 0.015 * epsilon  # Seen to notice 2 % less noise.
