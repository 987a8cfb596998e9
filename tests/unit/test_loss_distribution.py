"""Composed loss distributions give the figures of the accountant of record, quick ones nearly."""

import math

import numpy as np
import pytest
from by_library import dp_events, epsilon_of
from dp_accounting.pld import privacy_loss_distribution

from core.privacy.accounting.exact import exact_epsilon
from core.privacy.accounting.mechanism import RELATIONS
from core.privacy.accounting.quick import LIBRARY_RELATIONS, one_release, quick_epsilon

RELEASES = [(1e-4, 0.7, 100_000), (0.01, 1.0, 3000), (0.3, 5.0, 30), (1.0, 10.0, 3), (0.01, 0.4, 1)]


@pytest.mark.parametrize("relation", list(RELATIONS))
@pytest.mark.parametrize("mechanism", RELEASES)
def test_epsilon_is_the_library_s(relation, mechanism):
    for mechanisms in ([mechanism], [(0.2, 6.0, 10), mechanism]):
        events = dp_events(mechanisms)
        expected = epsilon_of(events, 1e-6, relation, 1e-3)
        assert exact_epsilon(mechanisms, 1e-6, relation, 1e-3) == expected
        assert quick_epsilon(mechanisms, 1e-6, relation, 1e-3) == pytest.approx(expected, rel=4e-6)


@pytest.mark.parametrize("sample_rate", [1e-4, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 20.0])
def test_deltas_of_one_release_are_the_library_s(sample_rate, noise_multiplier):
    epsilons = np.concatenate([np.linspace(0, 2, 41), np.linspace(2, 30, 20)])
    expected = privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=2e-3,
        sampling_prob=sample_rate,
        neighboring_relation=LIBRARY_RELATIONS["zero_out"],
    ).get_delta_for_epsilon(epsilons)
    found = one_release(sample_rate, noise_multiplier, "zero_out", 2e-3)
    np.testing.assert_allclose(found.get_delta_for_epsilon(epsilons), expected, rtol=0, atol=1e-14)


def test_what_is_no_longer_private_is_infinite():
    assert quick_epsilon([(1.0, 0.02, 1)], 1e-6, "zero_out", 5e-3) == math.inf
    assert quick_epsilon([(1e-3, 1e4, 1)], 1e-5, "zero_out", 1e-4) == 0.0
