"""Frequency features, the generator fitted to them, and what their settings may be."""

import pytest
import torch
import torch.nn.functional as F

from core.config import Config, load
from core.errors import ConfigError, InfeasibleError
from core.privacy.mechanisms.frequency import FourierFeatures
from core.privacy.plan import plan
from core.privacy.plan.plan import check_feasible, make_plan
from core.training.feature_generator import AuxiliaryGenerator, distances_to, fitted_images


def pro(**changes: object) -> Config:
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    return load({}, {"method": "feta_pro", **settings})


def test_features_have_norm_1_and_approximate_the_kernel():
    config = pro(frequency__num_features=10_000, frequency__length_scale=0.3)
    images = torch.rand((6, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    features = FourierFeatures(config, "cpu")(images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
    distance = (images[:, None] - images[None]).square().mean(dim=(2, 3, 4)).sqrt()
    kernel = (-distance.square() / (2 * 0.3**2)).exp()
    torch.testing.assert_close(features @ features.T, kernel, rtol=0, atol=0.05)
    again = FourierFeatures(config, "cpu")(images)
    assert torch.equal(features, again)


def test_distance_is_without_bias_and_zero_for_the_same_distribution():
    generator = torch.Generator().manual_seed(0)
    population = F.normalize(torch.rand((50, 16), generator=generator), dim=1)
    target = population.mean(dim=0, keepdim=True)
    chosen = torch.randint(50, (20_000, 4), generator=generator)
    means = population[chosen].mean(dim=1)
    assert distances_to(target, means, 4).mean().abs() < 1e-3
    biased = (means - target).square().sum(dim=1).mean()
    assert biased > 0.02


@pytest.mark.parametrize(("side", "channels"), [(4, 1), (8, 1), (9, 3), (28, 1)])
def test_generator_draws_images_of_any_side(side, channels):
    images = AuxiliaryGenerator(channels, side, 5)(torch.zeros((3, 16)), torch.tensor([0, 1, 4]))
    assert images.shape == (3, channels, side, side)
    assert 0 < images.min() <= images.max() < 1


def test_images_resemble_their_class_and_are_a_function_of_the_release():
    stripes = torch.zeros((2, 1, 8, 8))
    stripes[0, :, :, ::2] = 1.0
    stripes[1, :, ::2, :] = 1.0
    config = pro(
        dataset__num_classes=2, frequency__num_features=400, frequency__length_scale=0.5,
        frequency__num_steps=60, frequency__batch_size=16, frequency__num_images=5,
    )  # fmt: skip
    features = FourierFeatures(config, "cpu")
    before = torch.random.get_rng_state()
    fitted, _ = fitted_images(config, features, features(stripes))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert fitted.labels.tolist() == [0, 1, 0, 1, 0]
    assert fitted.images.dtype == torch.uint8
    away = (fitted.images.float() / 255)[:, None] - stripes[None]
    away = away.abs().mean(dim=(2, 3, 4))
    assert (away.argmin(dim=1) == fitted.labels).all()
    assert away.min(dim=1).values.max() < 0.3
    assert torch.equal(fitted_images(config, features, features(stripes))[0].images, fitted.images)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("noise_multiplier", 0.2, r"finite number in \[0\.3"),
        ("noise_multiplier", float("inf"), "finite number"),
        ("num_features", 401, "must be even"),
        ("length_scale", 0, r"in \(0"),
        ("share", 1.5, r"in \[0\.0, 1\.0\]|in \[0, 1\]"),
        ("num_images", 9, "must be at least 10, 1 for each"),
        ("batch_size", 19, "must be at least 20, 2 for each"),
        ("num_steps", 0, "integer in"),
    ],
)
def test_settings_out_of_range_are_refused(key, value, reason):
    with pytest.raises(ConfigError, match=rf"frequency\.{key}=.*{reason}"):
        pro(**{f"frequency__{key}": value})


@pytest.mark.parametrize(("share", "steps"), [(0.0, (10, 0)), (0.3, (7, 3)), (1.0, (0, 10))])
def test_what_no_step_trains_on_is_not_released(share, steps):
    config = pro(frequency__share=share, frequency__noise_multiplier=9, training__num_steps=20)
    assert (config.warm_up_steps - config.frequency_steps, config.frequency_steps) == steps
    released = plan._problem(config).spent
    assert ((1.0, 9.0, 1) in released) == (steps[1] > 0)
    assert len(released) == (steps[0] > 0) + (steps[1] > 0)
    others = {"method": "dp_feta", "training.num_steps": 20, "frequency.share": share}
    assert load({}, others).frequency_steps == 0


@pytest.mark.parametrize(
    "scope", [{}, {"privacy.scope": "sweep", "privacy.num_shares": 4}], ids=["trial", "sweep"]
)
def test_the_stage_that_is_too_dear_is_named(scope):
    dear = {"privacy.target_epsilon": 1.0, "method": "feta_pro", **scope}
    for check in (check_feasible, make_plan):
        with pytest.raises(
            InfeasibleError,
            match=r"the frequency features .* raise frequency\.noise_multiplier \(2\)",
        ):
            check(load({}, dear | {"frequency.noise_multiplier": 2.0}))
