"""The denoiser that starts from class moments: its closed form, its first samples, its loss."""

import dataclasses

import pytest
import torch

from core.config import Config, SamplerConfig, load
from core.data import Split
from core.diffusion.denoiser import Denoiser, MomentsDenoiser, build_denoiser
from core.diffusion.gaussians import Gaussians
from core.diffusion.loss import draw, edm_loss
from core.diffusion.sampler import sample
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms.moments import release_moments
from core.privacy.mechanisms.per_example_gradients import PerExampleGradients
from core.privacy.plan.releases import MomentsPlan
from core.training.class_gaussians import gaussians_of

NOISE = KeyedStream(b"n" * 32)
SETTINGS = {
    "dataset.num_classes": 2,
    "dataset.num_examples": 4_000,
    "evaluation.num_images": 4,
    "central_images.kind": "moments",
    "central_images.image_size": 4,
    "central_images.num_components": 6,
    "central_images.eigenvalue_floor": 0.0,
    "diffusion.sigma_outside": 0.05,
}


def gaussians(pixels: int, components: int, classes: int = 2, seed: int = 0) -> Gaussians:
    """Arbitrary ones, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn((columns, rows), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn)[0].T

    found = Gaussians(pixels, components, classes).double()
    axes = [orthonormal(components, components) for _ in range(classes + 1)]
    state = {
        "center": torch.randn(pixels, generator=generator) / 3,
        "basis": orthonormal(components, pixels),
        "means": torch.randn((classes + 1, components), generator=generator),
        "axes": torch.stack(axes),
        "variances": 2 * torch.rand((classes + 1, components), generator=generator),
        "outside": torch.tensor(0.3),
        "residual": torch.tensor(0.3),
    }
    found.load_state_dict(state)
    return found


def covariance(found: Gaussians, label: int) -> torch.Tensor:
    columns = found.basis.T @ found.axes[label]
    inside = (columns * found.variances[label]) @ columns.T
    return inside + found.outside * torch.eye(len(found.center), dtype=inside.dtype)


def mean_of(found: Gaussians, label: int) -> torch.Tensor:
    return found.center + found.means[label] @ found.basis


@pytest.mark.parametrize("sigma", [0.002, 0.3, 1.7, 80.0])
@pytest.mark.parametrize(("pixels", "components"), [(1, 1), (2, 1), (2, 2)])
def test_the_closed_form_is_the_posterior_mean_by_quadrature(sigma, pixels, components):
    found = gaussians(pixels, components)
    for label in range(3):
        mean, wide = mean_of(found, label), covariance(found, label)
        noisy = mean + torch.tensor([0.7, -1.1][:pixels]).double()
        # The integrand lies within some deviations of its peak, which quadrature must resolve.
        around = (wide.inverse() + torch.eye(pixels) / sigma**2).inverse()
        peak = around @ (wide.inverse() @ mean + noisy / sigma**2)
        reach = 9 * around.diagonal().sqrt()
        lines = [torch.linspace(-r, r, 301).double() + p for r, p in zip(reach, peak, strict=True)]
        points = torch.cartesian_prod(*lines).view(-1, pixels)
        apart, noise = points - mean, noisy - points
        logs = -((apart @ wide.inverse()) * apart).sum(1) / 2 - noise.square().sum(1) / 2 / sigma**2
        weights = torch.softmax(logs, 0)
        expected = weights @ points
        level, labels = torch.tensor([sigma]).double(), torch.tensor([label])
        closed = found(noisy.view(1, 1, 1, pixels), level, labels).flatten()
        torch.testing.assert_close(closed, expected, rtol=1e-6, atol=1e-6)
        # As the residual is the variance outside, the error is the posterior variance.
        spread = (weights @ (points - expected).square()).mean()
        torch.testing.assert_close(found.error(level, labels)[0], spread, rtol=1e-4, atol=1e-12)


def test_the_error_is_that_of_images_of_another_variance_outside():
    found = gaussians(12, 3)
    found.residual.fill_(0.9)
    generator = torch.Generator().manual_seed(1)
    count, label = 60_000, torch.ones(60_000, dtype=torch.long)
    clean = found.along(label, torch.randn((count, 3), generator=generator).double())
    drawn = torch.randn((count, 12), generator=generator).double()
    inside = (drawn @ found.basis.T) @ found.basis
    clean += found.outside.sqrt() * inside + found.residual.sqrt() * (drawn - inside)
    for sigma in (0.1, 0.6, 3.0):
        noisy = clean + sigma * torch.randn(clean.shape, generator=generator).double()
        level = torch.full((count,), sigma).double()
        closed = found(noisy.view(-1, 1, 3, 4), level, label).flatten(1)
        error = (closed - clean).square().mean()
        assert error.item() == pytest.approx(found.error(level, label)[0].item(), rel=0.01)


def test_the_isotropic_case_is_edms_preconditioning():
    """To the last bits of float64: skip, output, input and loss weight."""

    class First(torch.nn.Module):
        def forward(self, x: torch.Tensor, c_noise: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return (x[:, :1] + c_noise.view(-1, 1, 1, 1)).sin()

    found = Gaussians(16, 2, 3).double()
    found.outside.fill_(0.25)
    found.residual.fill_(0.25)
    ours, theirs = MomentsDenoiser(First(), 0.5, found), Denoiser(First(), 0.5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((50, 1, 4, 4), generator=generator, dtype=torch.float64)
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    labels = torch.arange(50) % 4
    found = ours(x, sigma, labels)
    torch.testing.assert_close(found, theirs(x, sigma, labels), rtol=1e-13, atol=1e-15)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    torch.testing.assert_close(ours.weight(sigma, labels), weight, rtol=1e-13, atol=0)


def released(config: Config, split: Split) -> Gaussians:
    plan = MomentsPlan.of(config)
    assert plan is not None
    quiet = dataclasses.replace(plan, noise_multiplier=1e-9)
    moments = release_moments(split, 2, config.central_images, quiet, NOISE)
    return gaussians_of(moments, quiet, config)


def striped(side: int, channels: int = 1) -> Split:
    """Two classes: stripes of random brightness across and along, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4_000) % 2
    waves = torch.rand((4_000, channels, side), generator=generator)
    waves = torch.nn.functional.interpolate(waves[..., :2], size=side, mode="linear")
    grey = torch.where(labels.view(-1, 1, 1, 1) == 0, waves[..., None], waves[..., None, :])
    grey = 0.2 + 0.5 * grey + 0.1 * torch.rand((4_000, channels, side, side), generator=generator)
    return Split((255 * grey).round().byte(), labels)


def test_without_noise_the_gaussians_have_the_moments_of_the_data():
    config = load({}, SETTINGS | {"dataset.image_size": 4, "dataset.channels": 3,
                                  "central_images.num_components": 48})  # fmt: skip
    split = striped(4, channels=3)
    found = released(config, split)
    rows = 2 * split.images.double().flatten(1) / 255 - 1
    for label in (0, 1, 2):
        mine = rows if label == 2 else rows[split.labels == label]
        torch.testing.assert_close(mean_of(found, label).double(), mine.mean(0), rtol=0, atol=1e-5)
        wide = covariance(found, label) - found.outside * torch.eye(48)
        expected = torch.cov(mine.T, correction=0)
        torch.testing.assert_close(wide.double(), expected, rtol=0, atol=1e-5)
    few = released(load({}, SETTINGS | {"dataset.image_size": 4}), striped(4))
    rows = 2 * striped(4).images.double().flatten(1) / 255 - 1
    rows = rows - rows.mean(0)
    left = rows - (rows @ few.basis.double().T) @ few.basis.double()
    expected = left.square().sum(1).mean() / (16 - 6)
    assert few.residual.item() == pytest.approx(expected.item(), rel=1e-3)


def test_moments_at_a_small_side_are_those_of_the_up_scaled_images():
    config = load({}, SETTINGS | {"dataset.image_size": 8, "central_images.num_components": 16})
    split = striped(4)
    size = {"size": (8, 8), "mode": "bilinear"}
    large = torch.nn.functional.interpolate(2 * split.images.double() / 255 - 1, **size)
    found = released(config, split)  # Images that are as small already.
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(16), rtol=0, atol=1e-5)
    for label in (0, 1):
        mine = large[split.labels == label].flatten(1)
        torch.testing.assert_close(mean_of(found, label).double(), mine.mean(0), rtol=0, atol=1e-5)
        wide = covariance(found, label) - found.outside * torch.eye(64)
        expected = torch.cov(mine.T, correction=0)
        torch.testing.assert_close(wide.double(), expected, rtol=0, atol=1e-5)


def test_variances_that_noise_alone_makes_count_as_zero():
    settings = {"dataset.image_size": 8, "central_images.image_size": 8,
                "central_images.num_components": 40, "central_images.max_norm": 3.0}  # fmt: skip
    config = load({}, SETTINGS | settings | {"central_images.eigenvalue_floor": 1.1})
    plan = MomentsPlan.of(config)
    assert plan is not None
    grey = Split(torch.full((4_000, 1, 8, 8), 128).byte(), torch.arange(4_000) % 2)
    moments = release_moments(grey, 2, config.central_images, plan, NOISE)
    assert gaussians_of(moments, plan, config).variances[:2].max() < 1e-6
    all_kept = load({}, SETTINGS | settings)
    assert (gaussians_of(moments, plan, all_kept).variances[:2] > 0).float().mean() > 0.3


def started(config: Config, found: Gaussians) -> MomentsDenoiser:
    denoiser = build_denoiser(config)
    assert isinstance(denoiser, MomentsDenoiser)
    denoiser.gaussians.load_state_dict(found.state_dict())
    return denoiser


class Nothing(torch.nn.Module):
    def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x[:, :1])


@pytest.mark.parametrize(("name", "steps"), [("heun", 24), ("ddim", 120)])
def test_before_any_step_it_samples_the_class_gaussians(name, steps):
    config = load({}, SETTINGS | {"dataset.image_size": 4})
    found = released(config, striped(4))
    start, few = started(config, found), torch.arange(6) % 3
    noisy, level = torch.randn(6, 1, 4, 4), torch.full((6,), 0.7)
    assert torch.equal(start(noisy, level, few), found(noisy, level, few))
    labels = torch.arange(9_000) % 3  # The last is "no label".
    denoiser = MomentsDenoiser(Nothing(), 0.5, found)  # As the network is so far, only faster.
    sampler = SamplerConfig(name=name, num_steps=steps)
    images = sample(denoiser, labels, (1, 4, 4), sampler, 2, torch.Generator().manual_seed(0))
    for label in range(3):
        drawn = images[labels == label].flatten(1)
        assert (drawn.mean(0) - mean_of(found, label)).abs().max() < 0.02
        wide = covariance(found, label)
        difference = torch.cov(drawn.T) - wide
        assert difference.norm() < 0.08 * wide.norm()
    other = covariance(found, 0) - covariance(found, 1)
    assert other.norm() > 0.5 * wide.norm()  # The classes can be told apart.


def test_plain_draws_have_the_moments_but_for_what_is_assumed_outside():
    found = gaussians(6, 3).float()
    labels = torch.arange(60_000) % 3
    images = found.draw(labels, torch.Generator().manual_seed(0))
    for label in range(3):
        drawn, wide = images[labels == label], covariance(found, label)
        assert (drawn.mean(0) - mean_of(found, label)).abs().max() < 0.03
        expected = wide - found.outside * torch.eye(6)
        assert (torch.cov(drawn.T) - expected).norm() < 0.05 * wide.norm()


def test_each_example_has_the_gradient_of_its_own_weighted_loss():
    config = load({}, SETTINGS | {"dataset.image_size": 8})
    split = striped(8)
    denoiser = started(config, released(config, split))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    images = 2 * split.images[:3].float() / 255 - 1
    draws = draw("test", 0, torch.arange(3), 2, (1, 8, 8), "cpu")
    labels = split.labels[:3]

    def loss(network: torch.nn.Module) -> torch.Tensor:
        settings = config.diffusion
        return edm_loss(network, images, labels, draws, settings, 0.1, 2, denoiser.weight)

    apart = [torch.autograd.grad(each, [*denoiser.parameters()], retain_graph=True)
             for each in loss(denoiser)]  # fmt: skip
    sigma = (config.diffusion.p_mean + config.diffusion.p_std * draws.log_sigma[0]).exp()
    conditions = torch.where(draws.dropout[0] < 0.1, 2, labels[0])
    noisy = images[0] + sigma.view(-1, 1, 1, 1) * draws.noise[0]
    error = (denoiser(noisy, sigma, conditions) - images[0]).square().mean((1, 2, 3))
    expected = (error / denoiser.gaussians.error(sigma, conditions)).mean()
    torch.testing.assert_close(loss(denoiser)[0], expected)
    wrapped = PerExampleGradients(denoiser, 2)
    loss(wrapped).sum().backward()
    for number, parameter in enumerate(denoiser.parameters()):
        for example in range(3):
            torch.testing.assert_close(
                parameter.grad_sample[example], apart[example][number], rtol=1e-4, atol=1e-5
            )
