"""Each switch of the engine, at noise 0, against clipped gradients of plain float32 autograd."""

import pytest
import torch
from torch import nn

from core.config import load
from core.data import Split, to_float, to_model_range
from core.diffusion.denoiser import Denoiser, build_denoiser
from core.diffusion.loss import draw, edm_loss
from core.diffusion.sampler import sample
from core.privacy.keys import KeyedStream
from core.privacy.plan.plan import DpSgdPlan
from core.training.stages import private_stage

COUNT, COPIES = 5, 2
PLAN = DpSgdPlan(
    num_steps=1, sample_rate=1.0, noise_multiplier=0.0, max_grad_norm=0.5, expected_batch_size=8
)
BASE = {
    "private_training.noise_multiplicity": COPIES,
    "model.base_channels": 8,
    "model.attention_sizes": [4],
    "runtime.device": "cpu",
}


def images() -> Split:
    pixels = torch.randint(0, 256, (COUNT, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return Split(pixels.byte(), torch.arange(COUNT))


def denoiser_of(**settings: object) -> Denoiser:
    denoiser = build_denoiser(
        load({}, BASE | {k.replace("__", "."): v for k, v in settings.items()})
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # Zero-initialised layers would hide the gradients of those below.
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def plain_update(layout: str = "ddpm") -> torch.Tensor:
    """What one step subtracts, example after example, without any of this project's engine."""
    config, denoiser, split = load({}, BASE), denoiser_of(model__layout=layout), images()
    total = torch.zeros(sum(parameter.numel() for parameter in denoiser.parameters()))
    for i in range(COUNT):
        ids = torch.tensor([i])
        draws = draw(f"{config.seed}/private_training", 0, ids, COPIES, (1, 8, 8), "cpu")
        clean = to_model_range(to_float(split.images[ids]))
        loss = edm_loss(denoiser, clean, split.labels[ids], draws, config.diffusion, 0.1, 10)
        found = torch.autograd.grad(loss.sum(), list(denoiser.parameters()))
        gradient = torch.cat([part.flatten() for part in found])
        total += gradient * (PLAN.max_grad_norm / gradient.norm()).clamp(max=1)
    return total / PLAN.expected_batch_size


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-5),
        ({"runtime__channels_last": True}, 1e-5),
        ({"private_training__max_physical_batch_size": "auto"}, 1e-5),
        ({"private_training__max_physical_batch_size": 2}, 1e-5),
        ({"model__layout": "ncsnpp"}, 1e-5),
        ({"training__precision": "bfloat16"}, 2**-5),
        ({"training__precision": "bfloat16", "runtime__channels_last": True}, 2**-5),
    ],
)
def test_a_step_is_that_of_plain_float32(settings, tolerance, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.optim, "Adam", lambda params, lr: torch.optim.SGD(params, lr=1.0))
    config = load(
        {},
        BASE
        | {"runtime.cache": str(tmp_path)}
        | {key.replace("__", "."): value for key, value in settings.items()},
    )
    denoiser = denoiser_of(**settings)
    start = nn.utils.parameters_to_vector(denoiser.parameters()).detach().clone()
    masks, noise = KeyedStream(b"m" * 32), KeyedStream(b"n" * 32)
    private_stage(config, denoiser, images(), PLAN, masks, noise, lambda _: None).step(0)
    found = start - nn.utils.parameters_to_vector(denoiser.parameters()).detach()
    expected = plain_update(config.model.layout)
    error = (found - expected).norm() / expected.norm()
    assert error < tolerance
    if tolerance > 1e-3:
        assert error > 1e-5  # The lower precision was really used.
    assert all(parameter.dtype == torch.float32 for parameter in denoiser.parameters())


@pytest.mark.parametrize("channels_last", [False, True])
def test_feature_maps_lie_as_the_switch_says(channels_last):
    seen: list[bool] = []

    def look(layer: nn.Module, inputs: object, out: torch.Tensor) -> None:
        seen.append(out.is_contiguous(memory_format=torch.channels_last))

    denoiser = denoiser_of(runtime__channels_last=channels_last)
    norms = [layer for layer in denoiser.modules() if isinstance(layer, nn.GroupNorm)]
    for layer in norms:
        layer.register_forward_hook(look)
    denoiser(torch.zeros(2, 1, 8, 8), torch.ones(2), torch.zeros(2, dtype=torch.long))
    assert seen == [channels_last] * len(norms)


def test_images_drawn_in_bfloat16_are_close_to_those_in_float32():
    denoiser, drawn = denoiser_of(), {}
    for precision in ("float32", "bfloat16"):
        config = load({}, BASE | {"sampler.num_steps": 4, "sampler.precision": precision})
        labels, generator = torch.arange(COUNT), torch.Generator().manual_seed(5)
        drawn[precision] = sample(denoiser, labels, (1, 8, 8), config.sampler, 10, generator)
    assert drawn["bfloat16"].dtype == torch.float32
    gap = (drawn["bfloat16"] - drawn["float32"]).abs()
    assert gap.max() > 0  # The switch does something.
    assert gap.mean() < 0.02 * drawn["float32"].abs().mean()
