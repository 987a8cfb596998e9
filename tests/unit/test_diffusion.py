"""EDM diffusion against formulas worked out by hand and data whose denoiser is known."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from checks import is_binomial
from torch import nn

from core.config import DiffusionConfig, SamplerConfig, load
from core.diffusion.denoiser import Denoiser, build_denoiser
from core.diffusion.ema import Ema
from core.diffusion.loss import Draws, draw, edm_loss
from core.diffusion.sampler import sample, sigma_steps
from core.diffusion.unet import UNet


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recorder(nn.Module):
    """A raw network that remembers what it was given and answers with a constant."""

    def __init__(self, answer: float) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.x, self.c_noise, self.labels = x, c_noise, labels
        return torch.full_like(x, self.answer)


@pytest.mark.parametrize(
    ("sigma", "skip", "out", "inward", "noise"),
    [  # sigma_data 0.5, table 1 of Karras et al. (2022), worked out by hand.
        (0.5, 0.5, 0.25 / math.sqrt(0.5), 1 / math.sqrt(0.5), math.log(0.5) / 4),
        (1.0, 0.2, 0.5 / math.sqrt(1.25), 1 / math.sqrt(1.25), 0.0),
        (1.2, 0.25 / 1.69, 0.6 / 1.3, 1 / 1.3, 0.0455803892),
        (math.e**4, 0.25 / (math.e**8 + 0.25), 0.49997903, 0.01831487, 1.0),
    ],
)
def test_preconditioning_has_the_values_of_the_table(sigma, skip, out, inward, noise):
    network = Recorder(3.0)
    x = torch.tensor([2.0, -1.0]).view(1, 1, 1, 2)
    found = Denoiser(network, 0.5)(x, torch.tensor([sigma]), torch.tensor([7]))
    assert torch.allclose(found, skip * x + out * 3.0, rtol=1e-5, atol=1e-7)
    assert torch.allclose(network.x, inward * x, rtol=1e-5, atol=1e-7)
    assert network.c_noise.item() == pytest.approx(noise, rel=1e-5, abs=1e-7)
    assert network.labels.tolist() == [7]


@pytest.mark.parametrize("sigma", [0.01, 0.3, 1.0, 40.0])
def test_network_input_and_target_have_unit_variance(sigma):
    data, zeros = 0.7, torch.zeros(200_000, 1, 1, 1)
    clean = data * torch.randn(200_000, 1, 1, 1, generator=generator())
    noisy = clean + sigma * torch.randn(200_000, 1, 1, 1, generator=generator(1))
    levels, labels = torch.full((200_000,), sigma), torch.zeros(200_000, dtype=torch.long)
    network, zero = Recorder(1.0), Recorder(0.0)
    c_out = (Denoiser(network, data)(zeros, levels, labels)).mean()
    target = (clean - Denoiser(zero, data)(noisy, levels, labels)) / c_out
    for values in (zero.x, target):
        assert values.std().item() == pytest.approx(1.0, abs=0.01)
    # What remains to be learnt is uncorrelated with c_skip * x: c_skip is the best factor.
    assert abs(torch.corrcoef(torch.stack((noisy.flatten(), target.flatten())))[0, 1]) < 0.02


class Scaled(nn.Module):
    """A denoiser that depends on image, noise level and label alike."""

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return x * (1 + labels)[:, None, None, None] / (1 + sigma)[:, None, None, None]


def test_loss_is_the_mean_over_draws_of_the_weighted_error():
    settings = DiffusionConfig(sigma_data=0.6, p_mean=-0.8, p_std=1.1)
    images, labels = torch.rand(2, 1, 2, 2, generator=generator()) * 2 - 1, torch.tensor([0, 2])
    draws = Draws(
        log_sigma=torch.tensor([[0.0, -1.0, 2.0], [1.0, 0.5, -2.0]]),
        noise=torch.randn(2, 3, 1, 2, 2, generator=generator(1)),
        dropout=torch.tensor([[0.05, 0.5, 0.3], [0.9, 0.15, 0.1]]),
    )
    found = edm_loss(Scaled(), images, labels, draws, settings, 0.2, num_classes=5)
    dropped = {(0, 0), (1, 1), (2, 1)}
    for example in range(2):
        losses = []
        for copy in range(3):
            sigma = math.exp(-0.8 + 1.1 * draws.log_sigma[example, copy].item())
            label = 5 if (copy, example) in dropped else labels[example].item()
            noisy = images[example] + sigma * draws.noise[example, copy]
            error = (noisy * (1 + label) / (1 + sigma) - images[example]).square().mean()
            losses.append((sigma**2 + 0.36) / (sigma * 0.6) ** 2 * error.item())
        assert found[example].item() == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_untrained_denoiser_has_loss_one():
    """With F = 0 the weight makes the expected loss 1 at every noise level."""
    settings = DiffusionConfig(sigma_data=0.5)
    images = 0.5 * torch.randn(2_000, 1, 4, 4, generator=generator())
    draws = draw("test", 0, torch.arange(2_000), 4, (1, 4, 4), "cpu")
    denoiser, labels = Denoiser(Recorder(0.0), 0.5), torch.zeros(2_000, dtype=torch.long)
    losses = edm_loss(denoiser, images, labels, draws, settings, 0.1, 10)
    assert losses.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_labels_are_dropped_at_the_stated_rate(rate):
    network = Recorder(0.0)
    draws = draw("test", 0, torch.arange(5_000), 4, (1, 1, 1), "cpu")
    labels = torch.arange(5_000) % 3
    edm_loss(
        Denoiser(network, 0.5),
        torch.zeros(5_000, 1, 1, 1),
        labels,
        draws,
        DiffusionConfig(),
        rate,
        3,
    )
    dropped = network.labels == 3
    assert torch.equal(network.labels[~dropped], labels.repeat_interleave(4)[~dropped])
    count = int(dropped.sum())
    assert is_binomial(count, 20_000, rate)
    for wrong in (0.8 * rate, 1.2 * rate) if rate else (0.01,):
        assert not is_binomial(count, 20_000, wrong)


def test_noise_levels_follow_equation_5():
    settings = SamplerConfig(num_steps=7, sigma_min=0.01, sigma_max=50.0, rho=3.0)
    sigmas = sigma_steps(settings)
    assert sigmas.shape == (8,)
    assert sigmas[0].item() == pytest.approx(50.0)
    assert sigmas[-2].item() == pytest.approx(0.01)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    root = [50 ** (1 / 3) + i / 6 * (0.01 ** (1 / 3) - 50 ** (1 / 3)) for i in range(7)]
    assert sigmas[:-1].tolist() == pytest.approx([value**3 for value in root])
    assert sigma_steps(SamplerConfig(rho=1.0, num_steps=3))[1].item() == pytest.approx(40.001)


SHAPE = (2, 4, 4)
STD = 0.4
MEANS = torch.tensor([0.5, -0.2, 0.1])  # Of class 0, class 1 and without a label.


class Gaussian(nn.Module):
    """The exact denoiser of N(mean of the label, STD^2) in every pixel."""

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        mean, level = MEANS[labels].view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        return mean + STD**2 / (STD**2 + level**2) * (x - mean)


def draw_samples(count: int = 1_000, label: int = 0, seed: int = 0, **settings: object):
    labels = torch.full((count,), label)
    config = SamplerConfig.model_validate(settings)
    return sample(Gaussian(), labels, SHAPE, config, 2, generator(seed))


def is_target(samples: torch.Tensor, mean: float, std: float) -> bool:
    """Mean and standard deviation within 6 standard errors and 1 % for the discretisation."""
    values, count = samples.double(), samples.numel()
    near_mean = abs(values.mean() - mean) < 6 * std / count**0.5 + 0.01 * STD
    return bool(near_mean and abs(values.std() / std - 1) < 6 / (2 * count) ** 0.5 + 0.01)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "heun", "num_steps": 60},
        {"name": "ddim", "num_steps": 400},
        {"name": "heun", "num_steps": 100, "s_churn": 20.0},
        {"name": "heun", "num_steps": 150, "s_churn": 1e9},
        {"name": "ddim", "num_steps": 400, "s_churn": 10.0, "s_min": 0.05, "s_max": 10.0},
    ],
)
def test_samples_have_the_distribution_of_the_data(settings):
    for label in (0, 1):
        samples = draw_samples(label=label, **settings)
        assert samples.shape == (1_000, *SHAPE)
        mean = MEANS[label].item()
        assert is_target(samples, mean, STD)
        for wrong in ((mean + 0.04, STD), (mean, 0.93 * STD), (mean, 1.07 * STD)):
            assert not is_target(samples, *wrong)


def test_churn_adds_noise_only_between_its_limits():
    plain = draw_samples(3, num_steps=10)
    assert not torch.allclose(draw_samples(3, num_steps=10, s_churn=5.0), plain, atol=1e-2)
    outside = draw_samples(3, num_steps=10, s_churn=5.0, s_min=81.0)
    assert torch.equal(outside, plain)
    more = draw_samples(num_steps=40, s_churn=1e9, s_noise=1.1)
    assert more.std() > 1.02 * draw_samples(num_steps=40, s_churn=1e9).std()


@pytest.mark.parametrize(("name", "factor"), [("heun", 4.0), ("ddim", 2.0)])
def test_order_of_convergence(name, factor):
    """The exact end of the flow is known, so halving the steps shows the order of the solver."""
    limits = {"sigma_min": 1e-4, "sigma_max": 5.0, "rho": 3.0}
    start = 5.0 * torch.randn((200, *SHAPE), generator=generator())
    exact = MEANS[0] + (start - MEANS[0]) * STD / (STD**2 + 5.0**2) ** 0.5
    errors = [
        (draw_samples(200, name=name, num_steps=steps, **limits) - exact).abs().mean().item()
        for steps in (32, 64, 128)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert 0.85 * factor < coarse / fine < 1.2 * factor


def test_guidance_extrapolates_linearly_from_no_label_to_label():
    calls: list[int] = []

    class Counted(Gaussian):
        def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor):
            calls.append(int(labels[0]))
            return super().forward(x, sigma, labels)

    def guided(weight: float) -> torch.Tensor:
        config = SamplerConfig(num_steps=12, guidance=weight)
        return sample(Counted(), torch.zeros(50, dtype=torch.long), SHAPE, config, 2, generator())

    none = guided(1.0)
    assert set(calls) == {0}  # No second evaluation is paid for.
    assert torch.equal(none, draw_samples(50, num_steps=12))
    without_label = draw_samples(50, num_steps=12, label=2)
    assert torch.allclose(guided(0.0), without_label, atol=1e-5)
    for weight in (0.5, 2.0, 3.5):
        # Both denoisers share the factor of x, so the samples are linear in the weight as well.
        expected = without_label + weight * (none - without_label)
        assert torch.allclose(guided(weight), expected, atol=1e-4)


def test_same_generator_seed_gives_the_same_samples():
    for settings in ({}, {"s_churn": 20.0}, {"name": "ddim"}):
        first = draw_samples(4, seed=5, **settings)
        assert torch.equal(first, draw_samples(4, seed=5, **settings))
        assert not torch.allclose(first, draw_samples(4, seed=6, **settings))


def test_denoiser_and_loss_are_those_of_v_prediction():
    """Salimans and Ho (2022), section 4: v = alpha noise - s x, and x = alpha z - s v."""
    data, config = 0.5, DiffusionConfig()
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(6, 1, 4, 4, generator=generator, dtype=torch.float64)
    draws = draw("v", 0, torch.arange(6), 3, (1, 4, 4), "cpu")
    guess = torch.randn(18, 1, 4, 4, generator=generator, dtype=torch.float64)
    seen = []

    class Network(nn.Module):
        def forward(self, z: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            seen.append(z)
            return guess

    denoiser = Denoiser(Network(), data)
    losses = edm_loss(denoiser, images, torch.zeros(6).long(), draws, config, 0.0, 10)

    ratio = (config.p_mean + config.p_std * draws.log_sigma).exp().view(18, 1, 1, 1) / data
    alpha, s = 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
    x, noise = images.repeat_interleave(3, 0) / data, draws.noise.flatten(0, 1)
    z, v = alpha * x + s * noise, alpha * noise - s * x
    near = {"check_dtype": False, "rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(seen[0], z, **near)
    estimate = denoiser(data / alpha * z, (ratio * data).flatten(), torch.zeros(18).long())
    torch.testing.assert_close(estimate, data * (alpha * z + s * guess), **near)
    error = (v + guess).square().mean((1, 2, 3)).view(6, 3).mean(1)
    torch.testing.assert_close(losses, error, **near)


def test_ema_follows_the_recursion_with_warm_up():
    module = nn.Linear(2, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    ema = Ema(module, 0.3)
    expected = 1.0
    for update, decay in enumerate([0.1, 2 / 11, 3 / 12, 0.3, 0.3]):  # (1 + t) / (10 + t), capped.
        nn.init.constant_(module.weight, update + 2.0)
        ema.update(module)
        expected = decay * expected + (1 - decay) * (update + 2.0)
        assert ema.module.weight.flatten().tolist() == pytest.approx([expected] * 2)
    assert module.weight[0, 0] == 6.0
    assert not ema.module.weight.requires_grad


def test_ema_state_is_restored_with_its_counter():
    def advance(ema: Ema, values: list[float]) -> float:
        for value in values:
            nn.init.constant_(module.weight, value)
            ema.update(module)
        return ema.module.weight.item()

    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    whole, first, second = (Ema(module, 0.9) for _ in range(3))
    expected = advance(whole, [1.0, 2.0, 3.0, 4.0])
    advance(first, [1.0, 2.0])
    second.load_state_dict(first.state_dict())
    assert advance(second, [3.0, 4.0]) == expected


def network(perturbed: bool = True, **settings: object) -> UNet:
    base = {"model.base_channels": 8, "model.attention_sizes": [4], "dataset.num_classes": 3}
    config = load({}, base | {key.replace("__", "."): value for key, value in settings.items()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet(config.model, config.dataset)
        with torch.no_grad():  # Zero-initialised layers would hide what lies below them.
            for parameter in unet.parameters() if perturbed else ():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return unet.eval()


def inputs(channels: int = 1, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, channels, 8, 8, generator=generator())
    return x, torch.linspace(-1, 1, batch), torch.arange(batch) % 3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("layout", ["ddpm", "ncsnpp"])
def test_network_keeps_the_shape_and_starts_at_zero(channels, patch, layout):
    settings = {"dataset__channels": channels, "model__patch_size": patch, "model__layout": layout}
    x, noise, labels = inputs(channels)
    with torch.no_grad():
        out = network(**settings)(x, noise, labels)
        assert out.shape == x.shape
        assert out.abs().min() > 0
        assert (network(perturbed=False, **settings)(x, noise, labels) == 0).all()


@pytest.mark.parametrize("layout", ["ddpm", "ncsnpp"])
@pytest.mark.parametrize("patch", [1, 2])
def test_every_pixel_may_depend_on_every_other(patch, layout):
    """Patches go back to where they came from, and attention spans the image."""
    x, noise, labels = inputs(batch=1)
    x.requires_grad_(True)
    unet = network(model__patch_size=patch, model__attention_sizes=[4], model__layout=layout)
    out = unet(x, noise, labels)
    for row, column in ((0, 0), (3, 5)):
        (gradient,) = torch.autograd.grad(out[0, 0, row, column], x, retain_graph=True)
        assert (gradient != 0).all()
        near = (torch.arange(8) - row).abs()[:, None] + (torch.arange(8) - column).abs() <= 2
        assert gradient[0, 0][near].abs().mean() > gradient[0, 0][~near].abs().mean()


def change(unet: UNet, edit: Callable[..., None]) -> torch.Tensor:
    """Largest change of each example's output when `edit` has changed the inputs in place."""
    before, after = inputs(), inputs()
    edit(*after)
    with torch.no_grad():
        return (unet(*after) - unet(*before)).abs().amax((1, 2, 3))


def test_label_and_noise_level_change_the_output_of_their_own_example_alone():
    unet = network()

    def label(x: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor) -> None:
        labels[1] = 3  # "No label".

    def level(x: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor) -> None:
        noise[1] += 0.5

    def image(x: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor) -> None:
        x[1] += 1e3

    for edit in (label, level, image):
        moved = change(unet, edit)
        assert moved[1] > 1e-3
        assert moved[[0, 2]].max() < 1e-5


@pytest.mark.parametrize("layout", ["ddpm", "ncsnpp"])
def test_odd_multipliers_and_levels_fit_together(layout):
    unet = network(
        model__channel_multipliers=[1, 3, 2], model__blocks_per_level=2, model__layout=layout
    )
    x, noise, labels = inputs()
    assert unet(x, noise, labels).shape == x.shape


def test_the_same_seed_builds_the_same_denoiser_and_leaves_global_randomness_alone():
    before = torch.get_rng_state()
    first, second, other = (
        build_denoiser(load({}, {"seed": seed})).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), before)
