"""The easy stage's release: noise on every entry, bounded records, public divisor."""

import dataclasses

import pytest
import torch
from checks import box_muller, is_normal

from core.config import CentralImagesConfig, load
from core.data import Split
from core.errors import ConfigError
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms.central_images import (
    class_sums,
    down_scaled,
    noisy_class_sums,
    release_central_images,
)
from core.privacy.plan.releases import CentralPlan

MASKS, NOISE = KeyedStream(b"m" * 32), KeyedStream(b"n" * 32)
CLASSES = 3
TINY = 1e-9
"""What rounding may add to a sensitivity, relative: sums and norms are float64."""


def blank(count: int, value: int = 0, side: int = 14, channels: int = 1) -> Split:
    images = torch.full((count, channels, side, side), value, dtype=torch.uint8)
    return Split(images, torch.arange(count) % CLASSES)


def plan_for(config: CentralImagesConfig, **changes: float) -> CentralPlan:
    reach = max(config.pixel_center, 1 - config.pixel_center) if config.kind == "mean" else 1.0
    plan = CentralPlan(
        num_releases=config.per_class,
        sample_rate=1.0,
        noise_multiplier=config.noise_multiplier,
        sensitivity=reach * config.image_size,
        expected_class_count=100.0,
    )
    return dataclasses.replace(plan, **changes)


@pytest.mark.parametrize("kind", ["mean", "mode"])
def test_noise_has_the_planned_scale_on_every_class(kind):
    config = CentralImagesConfig(kind=kind, per_class=400, image_size=14, noise_multiplier=5.0)
    plan = plan_for(config, sample_rate=0.5)
    empty = Split(torch.zeros((0, 1, 14, 14), dtype=torch.uint8), torch.zeros(0, dtype=torch.long))
    sums = torch.stack(list(noisy_class_sums(empty, CLASSES, config, plan, MASKS, NOISE)))
    assert plan.noise_stddev == pytest.approx(5.0 * 14)
    for label in range(CLASSES):
        noise = sums[:, label].flatten()[:200_000].numpy()
        assert is_normal(noise, plan.noise_stddev)
        for wrong in (0.5, 2**-0.5, 2 / 3, 1.03, 3 / 2, 2.0):
            assert not is_normal(noise, wrong * plan.noise_stddev)
    flat = sums.flatten(2).transpose(0, 1).flatten(1)[:, :70_000]
    assert (torch.corrcoef(flat) - torch.eye(CLASSES)).abs().max() < 0.02


@pytest.mark.parametrize("kind", ["mean", "mode"])
@pytest.mark.parametrize("center", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("record", [0, 255, "random"])
def test_one_record_moves_the_sums_by_at_most_the_sensitivity(kind, center, channels, record):
    config = CentralImagesConfig(kind=kind, image_size=7, pixel_center=center)
    reach = max(center, 1 - center) if kind == "mean" else 1.0
    sensitivity = reach * (7 * 7 * channels) ** 0.5
    data = blank(2_400, 255, channels=channels)  # Many: coarse floats would round in steps.
    if record == "random":
        data.images[7] = torch.randint(0, 256, (channels, 14, 14), dtype=torch.uint8)
    else:
        data.images[7] = record
    everyone = torch.arange(2_400)
    without = everyone[everyone != 7]
    small = down_scaled(data.images, config)
    difference = class_sums(small, data.labels, CLASSES, config) - class_sums(
        small[without], data.labels[without], CLASSES, config
    )
    assert difference.norm() <= sensitivity * (1 + TINY)
    assert difference[[c for c in range(CLASSES) if c != 7 % CLASSES]].abs().max() == 0
    if kind == "mode" or ((record == 255 or center == 0.5) and record != "random"):
        assert difference.norm() >= sensitivity * (1 - TINY)  # The bound is tight.


@pytest.mark.parametrize("center", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("max_norm", [1e-3, 2.0, 100.0])
@pytest.mark.parametrize("record", [1.0, 255.0, -9.0, float("nan"), float("inf"), 1e20, "random"])
def test_a_clipped_record_moves_the_sums_by_at_most_the_plans_sensitivity(center, max_norm, record):
    settings = {"image_size": 8, "pixel_center": center, "max_norm": max_norm}
    run = load({}, {f"central_images.{key}": value for key, value in settings.items()})
    config, plan = run.central_images, CentralPlan.of(run)
    whole = 8 * max(center, 1 - center)
    assert plan.sensitivity == pytest.approx(min(max_norm, whole))
    images = torch.zeros(30, 1, 8, 8)
    images[7] = torch.rand(8, 8) if record == "random" else record
    everyone, labels = torch.arange(30), torch.arange(30) % CLASSES
    for small in (images, down_scaled(images, config)):  # Holds without the clamp, too.
        if max_norm > whole and small is images:
            continue  # There the clamp is what bounds the norm.
        without = everyone[everyone != 7]
        moved = class_sums(small, labels, CLASSES, config) - class_sums(
            small[without], labels[without], CLASSES, config
        )
        assert torch.isfinite(moved).all()
        assert moved.norm() <= plan.sensitivity * (1 + TINY)
        assert moved[[c for c in range(CLASSES) if c != 7 % CLASSES]].abs().max() == 0
    if record == 255.0 and max_norm < whole / 2:
        assert moved.norm() >= plan.sensitivity * (1 - TINY)  # The bound is tight.


def test_clipping_keeps_directions_and_lowers_the_noise():
    settings = {"per_class": 400, "image_size": 8, "max_norm": 3.0, "noise_multiplier": 5.0}
    run = load({}, {f"central_images.{key}": value for key, value in settings.items()})
    config, plan = run.central_images, CentralPlan.of(run)
    assert plan.noise_stddev == pytest.approx(15.0)
    empty = Split(torch.zeros((0, 1, 8, 8), dtype=torch.uint8), torch.zeros(0, dtype=torch.long))
    sums = torch.stack(list(noisy_class_sums(empty, CLASSES, config, plan, MASKS, NOISE)))
    noise = sums.flatten().numpy()
    assert is_normal(noise, 15.0)
    for wrong in (2 / 3, 3 / 2, 8 / 3):  # The last is the noise without clipping.
        assert not is_normal(noise, wrong * 15.0)
    pair = torch.stack((torch.full((1, 8, 8), 0.1), torch.rand(1, 8, 8)))
    kept, scaled = class_sums(pair, torch.tensor([0, 1]), 2, config)
    assert torch.equal(kept, pair[0].double())  # Of norm 0.8: left as it is.
    assert torch.allclose(scaled, pair[1].double() * 3.0 / pair[1].double().norm())


@pytest.mark.parametrize("kind", ["mean", "mode"])
def test_sums_and_noise_are_rounded_once_and_together(kind):
    config = CentralImagesConfig(kind=kind, per_class=3, image_size=8, pixel_center=0.3)
    plan, data = plan_for(config, noise_multiplier=0.37), blank(5_000, side=8)
    generator = torch.Generator().manual_seed(6)
    data.images.copy_(torch.randint(0, 256, data.images.shape, generator=generator))
    everyone = class_sums(down_scaled(data.images, config), data.labels, CLASSES, config)
    assert everyone.dtype == torch.float64
    for number, released in enumerate(
        noisy_class_sums(data, CLASSES, config, plan, MASKS, NOISE)  # Of all, as q is 1.
    ):
        drawn = box_muller(NOISE, number, everyone.numel()).view_as(everyone)
        assert torch.equal(released, (everyone + plan.noise_stddev * drawn).float())
        assert not torch.equal(released, everyone.float() + (plan.noise_stddev * drawn).float())


def test_mode_images_are_not_clipped():
    with pytest.raises(ConfigError, match=r"central_images\.max_norm=2 .*kind='mean'"):
        load({}, {"central_images.kind": "mode", "central_images.max_norm": 2.0})


def test_divisor_is_the_public_expected_count():
    config = CentralImagesConfig(per_class=1, image_size=14)
    quiet = plan_for(config, noise_multiplier=1e-9)
    for count in (30, 60):
        images = release_central_images(blank(count, 255), CLASSES, config, quiet, MASKS, NOISE)
        assert torch.allclose(images.images, torch.tensor(count / CLASSES / 100), atol=1e-5)


def test_empty_class_and_empty_sample_are_ordinary():
    config = CentralImagesConfig(per_class=2, image_size=14)
    data = blank(30, 255)
    only = Split(data.images, torch.zeros(30, dtype=torch.long))
    images = release_central_images(
        only, CLASSES, config, plan_for(config, sample_rate=1e-9), MASKS, NOISE
    )
    assert torch.isfinite(images.images).all()
    assert images.images.shape == (2 * CLASSES, 1, 14, 14)
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert images.images.std() > 0.1


def test_sampling_follows_the_plan():
    config = CentralImagesConfig(per_class=200, image_size=2)
    plan = plan_for(config, sample_rate=0.25, noise_multiplier=1e-6)
    sums = torch.stack(
        list(noisy_class_sums(blank(3000, 255), CLASSES, config, plan, MASKS, NOISE))
    )
    counts = sums.mean(dim=(2, 3, 4))
    expected, error = 250.0, (1000 * 0.25 * 0.75 / counts.numel()) ** 0.5
    assert abs(counts.mean().item() - expected) < 5 * error
    assert 0.7 < counts.var().item() / (1000 * 0.25 * 0.75) < 1.35


@pytest.mark.parametrize("kind", ["mean", "mode"])
def test_central_images_look_like_their_class(kind):
    stripes = torch.zeros((600, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(600) % 2
    stripes[labels == 0, :, :, ::2] = 255
    stripes[labels == 1, :, ::2, :] = 255
    config = CentralImagesConfig(kind=kind, per_class=1, noise_multiplier=0.5, pixel_center=0.5)
    plan = plan_for(config, expected_class_count=300.0)
    images = release_central_images(Split(stripes, labels), 2, config, plan, MASKS, NOISE).images
    for label in (0, 1):
        truth = stripes[labels == label][0].float() / 255
        assert (images[label] - truth).abs().mean() < 0.12
        assert (images[label] - truth).abs().mean() < (images[1 - label] - truth).abs().mean()


def test_sharpening_steepens_edges_and_leaves_flat_parts():
    halves = torch.full((600, 1, 8, 8), 102, dtype=torch.uint8)
    halves[..., 4:] = 153
    labels = torch.arange(600) % 2
    released = {}
    for sharpen in (False, True):
        config = CentralImagesConfig(per_class=1, noise_multiplier=0.5, sharpen=sharpen)
        plan = plan_for(config, noise_multiplier=1e-9, expected_class_count=300.0)
        images = release_central_images(Split(halves, labels), 2, config, plan, MASKS, NOISE)
        released[sharpen] = images.images[0, 0, 4]
    assert torch.allclose(released[False], torch.tensor([0.4] * 4 + [0.6] * 4), atol=1e-3)
    # Pillow's SHARPEN: (32 x - 2 * sum of the eight around) / 16.
    expected = torch.tensor([0.4] * 3 + [0.325, 0.675] + [0.6] * 3)
    assert torch.allclose(released[True], expected, atol=1e-3)
