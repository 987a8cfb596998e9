"""The membership attack against closed forms, and against a model that remembers."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from core.config import DiffusionConfig, load
from core.data import Split, load_dataset, to_float, to_model_range
from core.diffusion.denoiser import Denoiser, build_denoiser
from core.diffusion.loss import draw, edm_loss
from core.evaluation.membership import (
    LEVELS,
    area,
    attack,
    attacks,
    denoising_losses,
    interval,
    noise_levels,
)
from core.evaluation.neighbors import nearest, pixels


def test_the_interval_inverts_the_binomial_tails() -> None:
    low, high = interval(7, 50)
    assert stats.binom.sf(6, 50, low) == pytest.approx(0.025, abs=1e-6)
    assert stats.binom.cdf(7, 50, high) == pytest.approx(0.025, abs=1e-6)
    assert interval(0, 20) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert interval(20, 20) == (pytest.approx(0.025 ** (1 / 20)), 1.0)


def test_the_area_counts_pairs() -> None:
    random = np.random.default_rng(0)
    members, others = random.integers(0, 9, 40), random.integers(2, 11, 30)
    pairs = [(m < o) + 0.5 * (m == o) for m in members for o in others]
    assert area(members, others) == pytest.approx(np.mean(pairs))


def test_normal_losses_have_the_closed_form() -> None:
    random = np.random.default_rng(0)
    members, others = random.normal(-1, 1, 4000), random.normal(0, 1, 4000)
    found = attack(members, others, epsilon=10, delta=1e-5)
    expected = stats.norm.cdf(1 / math.sqrt(2))
    low, high = found["auc_interval"]
    assert low < expected < high
    assert high - low < 0.04
    low, high = found["tpr_interval"]
    at = stats.norm.cdf(stats.norm.ppf(0.01) + 1)
    assert low - 0.02 < at < high + 0.02
    assert found["fpr_interval"][0] < 0.02
    assert found["within_bound"]
    assert found["tpr_bound_at_nominal_fpr"] == 1.0


def test_no_difference_is_not_found() -> None:
    random = np.random.default_rng(1)
    found = attack(random.normal(size=2000), random.normal(size=2000), epsilon=1, delta=1e-5)
    assert found["auc_interval"][0] < 0.5 < found["auc_interval"][1]
    assert found["epsilon_lower_bound"] == 0
    assert found["within_bound"]
    assert found["tpr_bound_at_nominal_fpr"] == pytest.approx(math.e * 0.01 + 1e-5)


def test_a_model_that_remembers_breaks_a_small_epsilon() -> None:
    random = np.random.default_rng(2)
    found = attack(random.normal(-9, 1, 2000), random.normal(size=2000), epsilon=1, delta=1e-5)
    assert not found["within_bound"]
    assert found["tpr"] == 1
    low, high = found["tpr_interval"][0], found["fpr_interval"][1]
    assert found["epsilon_lower_bound"] == pytest.approx(math.log((low - 1e-5) / high))
    assert found["epsilon_lower_bound"] > 3
    with pytest.raises(ValueError, match="3 members"):
        attack(np.zeros(3), np.zeros(9), 1, 1e-5)


class Remembering(torch.nn.Module):
    """Denoises to the nearest of the images that it holds, as a perfect memory would."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__()
        self.images = images.float() / 127.5 - 1

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert (sigma > 0).all()
        return self.images[torch.cdist(x.flatten(1), self.images.flatten(1)).argmin(1)]


def test_losses_tell_what_was_remembered() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.zeros(60, dtype=torch.int64)
    model = Remembering(images[:30])
    members, others = (
        denoising_losses(model, Split(images[part], labels[part]), DiffusionConfig(), 7, 0, "cpu")
        for part in (slice(0, 30), slice(30, 60))
    )
    assert members.shape == others.shape == (30, LEVELS)
    assert area(members.mean(1), others.mean(1)) == 1.0
    whole = denoising_losses(
        model, Split(images[:30], labels[:30]), DiffusionConfig(), 500, 0, "cpu"
    )
    np.testing.assert_allclose(members, whole, rtol=1e-5)


SMALL = load({}, {"model.base_channels": 16, "model.channel_multipliers": [1]})


def overfitted(images: torch.Tensor, labels: torch.Tensor, steps: int) -> Denoiser:
    """A small denoiser after so many steps of plain training on all images at once."""
    denoiser, clean = build_denoiser(SMALL), to_model_range(to_float(images))
    optimizer, ids = torch.optim.Adam(denoiser.parameters(), 3e-3), torch.arange(len(images))
    for step in range(steps):
        draws = draw("test", step, ids, 1, clean.shape[1:], "cpu")
        loss = edm_loss(denoiser, clean, labels, draws, SMALL.diffusion, 0.0, 10).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return denoiser.eval()


def some_digits(count: int) -> Split:
    """In random order, as the file's is that of the writers."""
    train = load_dataset(SMALL.dataset).train
    chosen = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))[:count]
    return Split(train.images[chosen], train.labels[chosen])


def test_an_overfitted_model_is_caught_at_every_noise_level() -> None:
    digits, sigmas = some_digits(400), noise_levels(SMALL.diffusion)
    model = overfitted(digits.images[:32], digits.labels[:32], steps=250)
    losses = denoising_losses(model, digits, SMALL.diffusion, 100, 0, "cpu")
    found = attacks(losses[:32], losses[32:], sigmas, epsilon=1, delta=1e-5, seed=0)
    assert found["auc_interval"][0] > 0.9
    assert found["tpr_interval"][0] > 0.3
    assert not found["within_bound"]
    assert [each["sigma"] for each in found["levels"]] == sigmas
    assert min(each["auc_interval"][0] for each in found["levels"]) > 0.6
    # Each is the attack by its own column.
    assert found["levels"][3]["auc"] == area(losses[:32, 3], losses[32:, 3])


def test_an_untrained_model_tells_nothing() -> None:
    """Its intervals miss 0.5 in one of 20 halvings, and in more than 9 of 40 once in 50,000."""
    fresh = build_denoiser(SMALL).eval()
    losses = denoising_losses(fresh, some_digits(400), SMALL.diffusion, 100, 0, "cpu").mean(1)
    random, missed = np.random.default_rng(0), 0
    for _ in range(40):
        random.shuffle(losses)
        found = attack(losses[:200], losses[200:], epsilon=1, delta=1e-5)
        low, high = found["auc_interval"]
        missed += not low < 0.5 < high
        assert found["within_bound"]
    assert missed <= 9


def test_nearest_is_that_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, searched = (
        torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=generator) for n in (9, 31)
    )
    found = nearest(queries, searched, pixels, 7)
    all_pairs = torch.cdist(
        queries.flatten(1).double() / 255,
        searched.flatten(1).double() / 255,
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    assert torch.equal(found.indices, all_pairs.argmin(1))
    torch.testing.assert_close(found.distances, all_pairs.min(1).values, rtol=1e-5, atol=1e-5)
    assert nearest(searched, searched, pixels, 7).distances.max() < 1e-6
