"""The frequency stage's release: noise on every entry, records of norm 1, and its charge."""

import dataclasses

import pytest
import torch
from by_library import dp_events, epsilon_of, subsampled_gaussian
from checks import box_muller, is_normal
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from test_plan_and_release import RELATIONS, SMALL

from core.config import load
from core.data import Split
from core.privacy.keys import KeyedStream
from core.privacy.ledger.ledger import events_of
from core.privacy.mechanisms.frequency import FourierFeatures, feature_sums, release_features
from core.privacy.plan.plan import PrivacyPlan, check_stages, make_plan
from core.privacy.plan.releases import FrequencyPlan

CLASSES, NOISE = 3, KeyedStream(b"n" * 32)
PRO = SMALL | {"method": "feta_pro", "frequency.noise_multiplier": 6.0}


def features_of(num_features: int = 64, **changes: object) -> FourierFeatures:
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    return FourierFeatures(load({}, {"frequency.num_features": num_features, **settings}), "cpu")


def test_noise_has_the_planned_scale_on_every_class():
    empty = Split(torch.zeros((0, 1, 8, 8), dtype=torch.uint8), torch.zeros(0, dtype=torch.long))
    plan = FrequencyPlan(noise_multiplier=5.0, expected_class_count=20.0)
    released = release_features(empty, features_of(40_000), CLASSES, plan, NOISE)
    assert plan.noise_stddev == 5.0
    for label in range(CLASSES):
        noise = released[label].numpy()
        assert is_normal(noise, 5.0 / 20.0)
        for wrong in (0.5, 2 / 3, 3 / 2, 2.0):
            assert not is_normal(noise, wrong * 5.0 / 20.0)
    assert (torch.corrcoef(released) - torch.eye(CLASSES)).abs().max() < 0.03


@pytest.mark.parametrize("record", ["black", "white", "random", "nan", "inf", "huge", "negative"])
def test_one_record_moves_the_sums_by_exactly_the_sensitivity(record):
    """Without it: as by an empty record, of the zero-out relation. The others do not hide it."""
    generator = torch.Generator().manual_seed(0)
    images = 255 * torch.rand((2_000, 1, 8, 8), generator=generator)
    odd = {"nan": torch.nan, "inf": torch.inf, "huge": 1e20, "negative": -1e20, "white": 255.0}
    if record != "random":
        images[7] = odd.get(record, 0.0)
    labels = torch.arange(2_000) % CLASSES
    features, others = features_of(), torch.arange(2_000) != 7
    difference = feature_sums(Split(images, labels), features, CLASSES) - feature_sums(
        Split(images[others], labels[others]), features, CLASSES
    )
    assert difference.norm().item() == pytest.approx(1.0, abs=1e-9)
    assert difference[[0, 2]].abs().max() < 1e-9  # It is of class 1.
    assert FrequencyPlan(1.0, 1.0).sensitivity == 1.0


def test_sums_and_noise_are_rounded_once_and_together():
    generator = torch.Generator().manual_seed(0)
    images = 255 * torch.rand((3_000, 1, 8, 8), generator=generator)
    split = Split(images, torch.arange(3_000) % CLASSES)
    features, plan = features_of(2_000), FrequencyPlan(1.7, expected_class_count=1.0)
    sums = feature_sums(split, features, CLASSES)
    noise = plan.noise_stddev * box_muller(NOISE, 0, sums.numel()).view_as(sums)
    released = release_features(split, features, CLASSES, plan, NOISE)
    assert torch.equal(released, (sums + noise).float())
    assert not torch.equal(released, (sums + noise.float()).float())


def test_divisor_is_the_public_expected_count():
    features, quiet = features_of(), FrequencyPlan(1e-12, expected_class_count=50.0)
    for count in (30, 60):
        images = torch.zeros((count, 1, 8, 8), dtype=torch.uint8)
        labels = torch.arange(count) % CLASSES
        released = release_features(Split(images, labels), features, CLASSES, quiet, NOISE)
        norms = released.norm(dim=1)
        torch.testing.assert_close(norms, torch.full((CLASSES,), count / CLASSES / 50))


@pytest.mark.parametrize("relation", list(RELATIONS))
def test_the_charge_is_that_of_the_gaussian_mechanism(relation):
    """Replacing a record by an empty one moves the sum by 1, by any other one by up to 2."""
    terms = {"privacy.neighboring_relation": relation, "privacy.target_epsilon": 3.0}
    found = check_stages(load({}, PRO | terms))["frequency"]
    distance = {"zero_out": 1.0, "replace_one": 2.0}[relation]
    exact = privacy_loss_distribution.from_gaussian_mechanism(6.0, sensitivity=distance)
    assert found == pytest.approx(exact.get_epsilon_for_delta(1e-4), rel=1e-3)
    wrong = privacy_loss_distribution.from_gaussian_mechanism(9.0, sensitivity=distance)
    assert found > 1.3 * wrong.get_epsilon_for_delta(1e-4)


def test_epsilon_of_the_trial_is_that_of_all_three_releases():
    """Composed here by hand: the frequency features are not free, and DP-SGD pays for them."""
    plan, without = (make_plan(load({}, s)) for s in (PRO, PRO | {"method": "dp_feta"}))
    sigma = plan.noise_multiplier
    assert plan.mechanisms == [(0.2, 4.0, 4), (1.0, 6.0, 1), (0.05, sigma, 18)]
    accountant = PLDAccountant(RELATIONS["zero_out"], 1e-4)
    for mechanism in ((0.2, 4.0, 4), (1.0, 6.0, 1), (0.05, sigma, 18)):
        accountant.compose(subsampled_gaussian(*mechanism))
    assert plan.epsilon == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-6)
    assert 0.99 < plan.epsilon <= 1.0
    assert sigma > 1.05 * without.noise_multiplier
    assert (without.frequency, without.epsilon_frequency) == (None, 0.0)
    assert [event.kind for event in events_of(plan)] == ["central_images", "frequency", "dp_sgd"]
    assert plan.epsilon_after(0) == pytest.approx(
        epsilon_of(dp_events(plan.mechanisms[:2]), 1e-4, "zero_out"), rel=1e-6
    )
    assert PrivacyPlan.restored(plan.summary()) == plan
    older = {k: v for k, v in without.summary().items() if "frequency" not in k}
    assert PrivacyPlan.restored(older) == without


def test_numbers_of_the_release_come_from_the_configuration_alone():
    plan = make_plan(load({}, PRO)).frequency
    assert plan is not None
    assert dataclasses.astuple(plan) == (6.0, 100.0, 1.0)
