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
from core.errors import ConfigError
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms import moments
from core.privacy.mechanisms.moments import Moments, release_moments
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


def gaussians(pixels: int, components: int, clusters: int = 2, seed: int = 0) -> Gaussians:
    """Arbitrary ones of two classes, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(*shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn.mT)[0].mT

    found = Gaussians(pixels, components, 2, clusters).double()
    shape = (3, clusters, components)
    state = {
        "center": torch.randn(pixels, generator=generator) / 3,
        "basis": orthonormal(components, pixels),
        "log_weights": torch.rand((3, clusters), generator=generator).log_softmax(1),
        "means": torch.randn(shape, generator=generator),
        "axes": orthonormal(*shape, components),
        "variances": 2 * torch.rand(shape, generator=generator),
        "outside": torch.tensor(0.3),
    }
    found.load_state_dict(found.state_dict() | state)
    return found


def covariance(found: Gaussians, label: int, cluster: int = 0) -> torch.Tensor:
    columns = found.basis.T @ found.axes[label, cluster]
    inside = (columns * found.variances[label, cluster]) @ columns.T
    return inside + found.outside * torch.eye(len(found.center), dtype=inside.dtype)


def mean_of(found: Gaussians, label: int, cluster: int = 0) -> torch.Tensor:
    return found.center + found.means[label, cluster] @ found.basis


def by_quadrature(
    found: Gaussians, label: int, cluster: int, noisy: torch.Tensor, sigma: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logarithm of the density of `noisy`, posterior mean, and variance, mean over pixels."""
    pixels = len(noisy)
    mean, wide = mean_of(found, label, cluster), covariance(found, label, cluster)
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
    density = torch.logsumexp(logs, 0) + reach.log().sum() - wide.logdet() / 2
    return density, expected, (weights @ (points - expected).square()).mean()


@pytest.mark.parametrize("sigma", [0.002, 0.3, 1.7, 80.0])
@pytest.mark.parametrize(("pixels", "components"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("clusters", [1, 3])
def test_the_closed_form_is_the_posterior_mean_by_quadrature(sigma, pixels, components, clusters):
    found = gaussians(pixels, components, clusters)
    for label in range(3):
        noisy = mean_of(found, label) + torch.tensor([0.7, -1.1][:pixels]).double()
        parts = [by_quadrature(found, label, each, noisy, sigma) for each in range(clusters)]
        densities, means, variances = (torch.stack(part) for part in zip(*parts, strict=True))
        prior = found.log_weights[label]
        expected = torch.softmax(prior + densities, 0) @ means
        level, labels = torch.tensor([sigma]).double(), torch.tensor([label])
        closed = found(noisy.view(1, 1, 1, pixels), level, labels).flatten()
        torch.testing.assert_close(closed, expected, rtol=1e-6, atol=1e-6)
        # While nothing is ambiguous the error is the posterior variance.
        spread = prior.exp() @ variances
        torch.testing.assert_close(found.error(level, labels)[0], spread, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("clusters", [1, 3])
def test_the_error_is_that_of_draws(clusters):
    found = gaussians(12, 3, clusters)
    found.means *= 2
    found.float().measure(torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(1)
    count, label = 60_000, torch.ones(60_000, dtype=torch.long)
    clean = found.with_outside(label, generator)
    for sigma in (0.1, 0.6, 3.0):
        noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
        level = torch.full((count,), sigma)
        closed = found(noisy.view(-1, 1, 3, 4), level, label).flatten(1)
        error, close = (closed - clean).square().mean(), 0.01 if clusters == 1 else 0.03
        assert error.item() == pytest.approx(found.error(level, label)[0].item(), rel=close)
    if clusters > 1:  # Else the check above would not see it.
        assert found.ambiguity[1].max() / 12 > 0.05 * error


def test_a_class_at_a_time_gives_what_each_row_alone_does(monkeypatch):
    found, labels = gaussians(5, 3, clusters=4), torch.tensor([2, 0, 0, 1, 2, 0])
    x, sigma = torch.randn(6, 1, 1, 5, dtype=torch.float64), torch.rand(6).double() + 0.1
    together = found(x, sigma, labels)
    rows = torch.arange(6)[:, None, None]  # As on a GPU.
    monkeypatch.setattr("core.diffusion.gaussians._groups", lambda labels: [(labels, rows)])
    torch.testing.assert_close(found(x, sigma, labels), together)


def test_the_isotropic_case_is_edms_preconditioning():
    """To the last bits of float64: skip, output, input and loss weight."""

    class First(torch.nn.Module):
        def forward(self, x: torch.Tensor, c_noise: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return (x[:, :1] + c_noise.view(-1, 1, 1, 1)).sin()

    found = Gaussians(16, 2, 3).double()
    found.outside.fill_(0.25)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "reach_of", lambda *_: plan.max_norm)  # Clips none.
        found = release_moments(split, 2, config.central_images, quiet, NOISE)
    return gaussians_of(found, quiet, config)


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
    assert few.outside.item() == pytest.approx(expected.item(), rel=1e-3)


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
    drawn = release_moments(grey, 2, config.central_images, plan, NOISE)
    assert gaussians_of(drawn, plan, config).variances[:2].max() < 1e-6
    all_kept = load({}, SETTINGS | settings)
    assert (gaussians_of(drawn, plan, all_kept).variances[:2] > 0).float().mean() > 0.3


def started(config: Config, found: Gaussians) -> MomentsDenoiser:
    denoiser = build_denoiser(config)
    assert isinstance(denoiser, MomentsDenoiser)
    denoiser.gaussians.load_state_dict(found.state_dict())
    return denoiser


class Nothing(torch.nn.Module):
    def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x[:, :1])


@pytest.mark.parametrize(
    ("name", "steps", "sigma_max"), [("heun", 24, 80.0), ("ddim", 120, 80.0), ("heun", 12, 0.3)]
)
def test_before_any_step_it_samples_the_class_gaussians(name, steps, sigma_max):
    config = load({}, SETTINGS | {"dataset.image_size": 4})
    found = released(config, striped(4))
    start, few = started(config, found), torch.arange(6) % 3
    noisy, level = torch.randn(6, 1, 4, 4), torch.full((6,), 0.7)
    assert torch.equal(start(noisy, level, few), found(noisy, level, few))
    labels = torch.arange(9_000) % 3  # The last is "no label".
    denoiser = MomentsDenoiser(Nothing(), 0.5, found)  # As the network is so far, only faster.
    sampler = SamplerConfig(name=name, num_steps=steps, sigma_max=sigma_max)
    images = sample(denoiser, labels, (1, 4, 4), sampler, 2, torch.Generator().manual_seed(0))
    for label in range(3):
        drawn = images[labels == label].flatten(1)
        assert (drawn.mean(0) - mean_of(found, label)).abs().max() < 0.02
        wide = covariance(found, label)
        difference = torch.cov(drawn.T) - wide
        assert difference.norm() < 0.08 * wide.norm()
    other = covariance(found, 0) - covariance(found, 1)
    assert other.norm() > 0.5 * wide.norm()  # The classes can be told apart.


class Bright(torch.nn.Module):
    """Adds to every image what tells it from a draw of the Gaussians."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        return torch.full_like(x[:, :1], 50.0)


@pytest.mark.parametrize(
    ("share", "counts"), [(0.0, {40}), (0.25, {30}), (0.26, {29, 30}), (1.0, {0})]
)
def test_a_share_of_the_images_are_draws_of_the_gaussians(share, counts):
    found, labels = gaussians(16, 6).float(), torch.arange(40) % 2
    bright = MomentsDenoiser(Bright(), 0.5, found)
    sampler = SamplerConfig(num_steps=3, sigma_max=0.8, closed_form_share=share)

    def drawn(seed: int, sampler: SamplerConfig = sampler) -> torch.Tensor:
        noise = torch.Generator().manual_seed(seed)
        return sample(bright, labels, (1, 4, 4), sampler, 2, noise).flatten(1)

    sizes, rows = set(), torch.zeros(40)
    for seed in range(100):
        bright.network.seen.clear()
        images = drawn(seed)
        by_network = images.mean(1) > 5
        assert set(bright.network.seen) <= {int(by_network.sum())}  # The others cost no evaluation.
        sizes.add(int(by_network.sum()))
        rows += ~by_network
        assert images.isfinite().all()
        assert torch.equal(images, drawn(seed))
    assert sizes == counts
    assert ((rows / 100 - share).abs() < 0.22).all()  # Whatever the place in the chunk.
    if 0 < share < 1:
        away = torch.cat([drawn(seed)[labels == 1] for seed in range(150)])
        away = away[away.mean(1) < 5]
        alone = found.draw(torch.ones(len(away)).long(), torch.Generator().manual_seed(1))
        assert (away.mean(0) - alone.mean(0)).abs().max() < 0.2  # Of their own class.
        assert (torch.cov(away.T) - torch.cov(alone.T)).norm() < 0.2 * torch.cov(alone.T).norm()


def test_one_image_at_a_time_has_the_share_too():
    bright = MomentsDenoiser(Bright(), 0.5, gaussians(16, 6).float())
    sampler = SamplerConfig(num_steps=3, sigma_max=0.8, closed_form_share=0.75)
    label = torch.zeros(1).long()
    closed = [
        sample(bright, label, (1, 4, 4), sampler, 2, torch.Generator().manual_seed(seed)).mean() < 5
        for seed in range(400)
    ]
    assert 0.68 < sum(map(bool, closed)) / 400 < 0.82


def test_a_share_without_moments_is_refused():
    for method in ("dp_feta", "moments"):  # Whose bundle keeps the kind, not the method.
        with pytest.raises(ConfigError, match=r"closed_form_share=0.5 needs moments"):
            load({}, {"method": method, "sampler.closed_form_share": 0.5})
    for changes in ({"method": "dpdm"}, {"method": "moments"}, {}):  # Methods compare as they are.
        load({}, SETTINGS | {"sampler.closed_form_share": 0.5} | changes)


def test_plain_draws_have_the_moments_but_for_what_is_assumed_outside():
    found = gaussians(6, 3, clusters=3).float()
    labels = torch.arange(90_000) % 3
    images = found.draw(labels, torch.Generator().manual_seed(0))
    for label in range(3):
        weights = found.log_weights[label].exp()
        means = torch.stack([mean_of(found, label, each) for each in range(3)])
        wide = torch.stack([covariance(found, label, each) for each in range(3)])
        wide = (weights[:, None, None] * (wide + means[:, :, None] * means[:, None, :])).sum(0)
        mean = weights @ means
        drawn = images[labels == label]
        assert (drawn.mean(0) - mean).abs().max() < 0.03
        expected = wide - mean[:, None] * mean - found.outside * torch.eye(6)
        assert (torch.cov(drawn.T) - expected).norm() < 0.05 * wide.norm()


def of_two_kinds(count: int = 4_000) -> Split:
    """Two classes, each of images that are light above or light below, one kind three in four."""
    generator = torch.Generator().manual_seed(0)
    labels, kinds = torch.arange(count) % 2, torch.arange(count) // 2 % 4 == 0
    images = 0.2 + 0.1 * torch.rand((count, 1, 4, 4), generator=generator)
    images[kinds, :, :2] += 0.5
    images[~kinds, :, 2:] += 0.5
    images[labels == 1] += 0.1
    return Split((255 * images).round().byte(), labels)


TWO = {"dataset.image_size": 4, "central_images.num_clusters": 2}


@pytest.mark.parametrize("clusters", [2, 5])
def test_clusters_are_the_kinds_of_images_of_a_class(clusters):
    config = load({}, SETTINGS | TWO | {"central_images.num_clusters": clusters})
    split = of_two_kinds()
    found = released(config, split)
    rows = 2 * split.images.double().flatten(1) / 255 - 1
    kinds = torch.arange(4_000) // 2 % 4 == 0
    for label in range(2):
        weights = found.log_weights[label].exp()
        assert weights.sum().item() == pytest.approx(1, abs=1e-5)
        means = torch.stack([mean_of(found, label, each) for each in range(clusters)])
        for kind, share in ((kinds, 0.25), (~kinds, 0.75)):
            center = rows[kind & (split.labels == label)].mean(0).float()
            near = (means - center).norm(dim=1) < 0.3
            assert weights[near].sum().item() == pytest.approx(share, abs=1e-3)
    drawn = found.draw(torch.zeros(400, dtype=torch.long), torch.Generator().manual_seed(0))
    above = drawn.view(-1, 4, 4)[:, :2].mean((1, 2)) > drawn.view(-1, 4, 4)[:, 2:].mean((1, 2))
    assert above.float().mean().item() == pytest.approx(0.25, abs=0.07)


def test_a_cluster_of_too_few_images_is_left_out():
    config = load({}, SETTINGS | TWO | {"central_images.num_clusters": 3})
    plan = MomentsPlan.of(config)
    assert plan is not None
    whole = release_moments(of_two_kinds(), 2, config.central_images, plan, NOISE)
    counts = torch.tensor([[2_000.0, -30.0, plan.smallest_count - 1], [3.0, 5.0, -8.0]])
    found = gaussians_of(dataclasses.replace(whole, counts=counts), plan, config)
    assert found.log_weights[0].exp().tolist() == [1.0, 0.0, 0.0]
    assert found.log_weights[1].exp().tolist() == [0.0, 1.0, 0.0]  # All that the class has.
    assert all(value.isfinite().all() for value in found.state_dict().values())
    labels = torch.tensor([0, 1] * 50)
    drawn = found.draw(labels, torch.Generator().manual_seed(0))
    assert drawn.isfinite().all()


def test_covariances_of_clusters_are_drawn_towards_their_class_as_far_as_chance_explains():
    config = load({}, SETTINGS | TWO)
    plan = MomentsPlan.of(config)
    assert plan is not None
    alike = torch.eye(6).expand(2, 2, 6, 6)
    apart = alike.clone()
    apart[0, 0, 0, 0] = 20.0

    def variances(covariances: torch.Tensor, noise: float, count: float) -> torch.Tensor:
        quiet = dataclasses.replace(plan, noise_multiplier=noise)
        drawn = Moments(
            torch.zeros(1, 4, 4), torch.eye(6, 16).view(6, 1, 4, 4), torch.full((2, 2), count),
            torch.zeros(2, 2, 6), count * covariances, torch.tensor(1.0),
            torch.tensor(30.0),
        )  # fmt: skip
        return gaussians_of(drawn, quiet, config).variances / 4

    torch.testing.assert_close(variances(alike, 1e-9, 1e6)[:2], torch.ones(2, 2, 6))
    many = variances(apart, 1e-9, 1e6)
    assert many[0, 0, -1].item() == pytest.approx(20, rel=1e-3)
    assert many[0, 1, -1].item() == pytest.approx(1, rel=1e-3)
    few = variances(apart, 1e-9, 2.0)
    assert few[0, 0, -1].item() == pytest.approx(10.5, rel=0.01)  # Of two images: chance.
    loud = variances(apart, 1e6, 1e6)
    assert loud[0, 0].max() == loud[0, 1].max()


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
