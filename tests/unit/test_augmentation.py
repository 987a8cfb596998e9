"""Augmented central images stay images, differ from each other, and can be drawn again."""

from typing import get_args

import pytest
import torch

from core.config import WarmUpConfig
from core.training.augmentation import augment

KINDS = get_args(WarmUpConfig.model_fields["augmentation"].annotation)
CHANGING = [kind for kind in KINDS if kind != "none"]
# What moves the subject a little; RandAugment also draws operations that change light alone.
MOVING = [kind for kind in CHANGING if kind != "rand_augment"]


def images(channels: int = 1, side: int = 16, batch: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, channels, side, side, generator=generator) * 2 - 1


def augmented(batch: torch.Tensor, kind: str, seed: int = 0) -> torch.Tensor:
    return augment(batch, kind, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 28), (1, 5)])
def test_shape_type_and_range_are_kept(kind, channels, side):
    extremes = images(channels, side).sign()
    for batch in (images(channels, side), extremes, extremes[:1]):
        before = batch.clone()
        for seed in range(5):
            out = augmented(batch, kind, seed)
            assert out.shape == batch.shape
            assert out.dtype == torch.float32
            assert out.min() >= -1
            assert out.max() <= 1
        assert torch.equal(batch, before)  # The originals serve again.


def test_none_is_the_identity():
    assert torch.equal(augmented(images(), "none"), images())


@pytest.mark.parametrize("kind", CHANGING)
def test_same_generator_state_gives_the_same_images_and_global_randomness_is_not_used(kind):
    before = torch.get_rng_state()
    first = augmented(images(), kind, seed=3)
    assert torch.equal(first, augmented(images(), kind, seed=3))
    assert not torch.allclose(first, augmented(images(), kind, seed=4), atol=1e-2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", MOVING)
def test_each_image_of_a_batch_is_changed_in_its_own_way(kind):
    same = images(batch=1).repeat(4, 1, 1, 1)
    out = augmented(same, kind)
    for i in range(4):
        assert not torch.allclose(out[i], same[i], atol=1e-2)
        for j in range(i):
            assert not torch.allclose(out[i], out[j], atol=1e-2)


@pytest.mark.parametrize("kind", MOVING)
def test_the_subject_stays_in_the_picture(kind):
    batch = torch.full((50, 1, 16, 16), -1.0)
    batch[:, :, 6:10, 6:10] = 0.8
    out = augmented(batch, kind)
    light = out > -0.6
    assert light[:, :, 3:13, 3:13].any(dim=(2, 3)).all()
    assert not light[:, :, :2].any()
    assert not light[..., 14:].any()
    assert 8 <= light.sum(dim=(1, 2, 3)).float().mean() <= 24


def test_shift_moves_by_at_most_an_eighth_of_the_side():
    ramp = torch.linspace(-1, 1, 64).repeat(400, 1, 64, 1)
    moved = (augmented(ramp, "shift") - ramp)[:, 0, 32, 32] / (2 / 63)  # In pixels.
    assert 2 < moved.abs().max() <= 8.01
    assert abs(moved.mean()) < 1
    assert moved.min() < -2


def test_rand_augment_draws_operations_for_each_image():
    same = images(3, side=28, batch=1).repeat(40, 1, 1, 1)
    out = augmented(same, "rand_augment")
    rounded = ((same + 1) * 127.5).round() / 127.5 - 1
    changed = [not torch.equal(one, before) for one, before in zip(out, rounded, strict=True)]
    assert 25 <= sum(changed) < 40  # Two of its fourteen operations leave the image as it is.
    assert len({one.numpy().tobytes() for one in out}) > 25
