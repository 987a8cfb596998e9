"""DP-SGD's step: clip over all parameters, noise once with the planned scale, public divisor."""

import dataclasses

import pytest
import torch
from checks import box_muller, is_normal
from torch import nn

from core.config import load
from core.diffusion.denoiser import build_denoiser
from core.diffusion.loss import Draws, draw, edm_loss
from core.errors import ConfigError
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms.dp_sgd import DpSgdOptimizer
from core.privacy.mechanisms.per_example_gradients import PerExampleGradients
from core.privacy.plan.plan import DpSgdPlan

NOISE = KeyedStream(b"n" * 32)
PLAN = DpSgdPlan(
    num_steps=1, sample_rate=0.1, noise_multiplier=1.5, max_grad_norm=0.3, expected_batch_size=64
)
TINY = 1e-9
"""What rounding may add to the clip norm, relative."""


def optimizer_of(*parameters: nn.Parameter, **changes: float) -> DpSgdOptimizer:
    plan = dataclasses.replace(PLAN, **changes)
    return DpSgdOptimizer(torch.optim.SGD(parameters, lr=1.0), plan, NOISE)


def released(optimizer: DpSgdOptimizer, step: int = 0) -> torch.Tensor:
    before = [p.detach().clone() for p in optimizer.params]
    optimizer.release(step)
    moved = zip(before, optimizer.params, strict=True)
    return torch.cat([(a - b.detach()).flatten() for a, b in moved])


def test_noise_of_an_empty_batch_has_the_planned_scale():
    optimizer = optimizer_of(nn.Parameter(torch.zeros(400, 500)), nn.Parameter(torch.zeros(7)))
    noise = released(optimizer).numpy()
    planned = PLAN.noise_multiplier * PLAN.max_grad_norm / PLAN.expected_batch_size
    assert is_normal(noise, planned)
    assert (noise != 0).all()  # No parameter, however small, is left out.
    for wrong in (0.5, 2**-0.5, 2 / 3, 0.98, 1.02, 3 / 2, 2.0, 64.0):
        assert not is_normal(noise, wrong * planned)


def test_noise_enters_once_whatever_the_number_of_physical_batches():
    def noise_after(batches: int) -> torch.Tensor:
        parameter = nn.Parameter(torch.zeros(1000))
        optimizer = optimizer_of(parameter)
        for _ in range(batches):
            parameter.grad_sample = torch.zeros(8, 1000)
            optimizer.accumulate()
        return released(optimizer)

    assert torch.equal(noise_after(0), noise_after(1))
    assert torch.equal(noise_after(0), noise_after(5))


@pytest.mark.parametrize("value", [1.0, 255.0, -9.0, float("nan"), float("inf"), 1e20, 1e38])
@pytest.mark.parametrize("others", ["none", "zero", "random", "large"])
def test_one_record_moves_the_sum_by_at_most_the_clip_norm(value, others):
    generator = torch.Generator().manual_seed(1)
    rest = {
        "none": torch.zeros(0, 20),
        "zero": torch.zeros(5, 20),
        "random": torch.randn(5, 20, generator=generator) * 0.01,
        "large": torch.full((5, 20), 50.0),
    }[others]
    record = torch.full((1, 20), value)

    def total(rows: torch.Tensor) -> torch.Tensor:
        first, second = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.zeros(2, 4))
        optimizer = optimizer_of(first, second, noise_multiplier=0.0, expected_batch_size=1)
        if len(rows):
            first.grad_sample, second.grad_sample = rows[:, :12], rows[:, 12:].view(-1, 2, 4)
            optimizer.accumulate()
        return released(optimizer)

    with_record, without = total(torch.cat((rest, record))), total(rest)
    assert torch.isfinite(with_record).all()
    moved = (with_record - without).norm()
    assert moved <= PLAN.max_grad_norm * (1 + 1e-6)  # What was released is float32.
    if torch.isfinite(record).all():
        assert moved >= PLAN.max_grad_norm * (1 - 1e-6)


def pattern(kind: str, size: int) -> torch.Tensor:
    """Gradients `[3, size]` whose float32 norms are far off, or are not."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.rand((3, size), generator=generator)
    return {
        "equal": torch.full((3, size), 0.37),
        "random": rows,
        "one large": torch.cat((torch.full((3, 1), 4e3), rows[:, 1:]), dim=1),
        "tiny": rows * 1e-25,
        "huge": rows * 1e30,
    }[kind]


@pytest.mark.parametrize("kind", ["equal", "random", "one large", "tiny", "huge"])
@pytest.mark.parametrize("clip", [1e-30, 0.3, 50.0])
def test_no_clipped_example_exceeds_the_bound_in_the_largest_tensors(kind, clip):
    sizes = (2**21 + 1, 2**20, 7)
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    rows = [pattern(kind, size) for size in sizes]
    for example in range(3):
        optimizer = optimizer_of(*parameters, noise_multiplier=0.0, max_grad_norm=clip)
        for parameter, row in zip(parameters, rows, strict=True):
            parameter.grad_sample, parameter.summed_grad = row[example : example + 1].clone(), None
        optimizer.accumulate()
        summed = torch.cat([parameter.summed_grad.flatten() for parameter in parameters])
        given = torch.cat([row[example].double() for row in rows]).norm()
        assert summed.dtype == torch.float64
        assert summed.norm() <= clip * (1 + TINY)
        assert summed.norm() >= min(float(given), clip) * (1 - TINY)


def test_one_record_among_many_moves_the_sum_by_the_clip_norm_alone():
    generator = torch.Generator().manual_seed(4)
    common = torch.rand((1, 3_000), generator=generator)
    rows = torch.cat((common.expand(4_000, -1) * 1.7, torch.rand((1, 3_000), generator=generator)))

    def total(rows: torch.Tensor) -> torch.Tensor:
        parameter = nn.Parameter(torch.zeros(3_000))
        optimizer = optimizer_of(parameter)
        for part in rows.split(700):
            parameter.grad_sample = part.clone()
            optimizer.accumulate()
        return parameter.summed_grad

    moved = (total(rows) - total(rows[:-1])).norm()
    assert PLAN.max_grad_norm * (1 - TINY) <= moved <= PLAN.max_grad_norm * (1 + TINY)


def test_sum_and_noise_are_rounded_once_and_together():
    rows = torch.rand((300, 5_000), generator=torch.Generator().manual_seed(5))
    parameter = nn.Parameter(torch.zeros(5_000))
    optimizer = optimizer_of(parameter, expected_batch_size=1)
    parameter.grad_sample = rows.clone()
    optimizer.accumulate()
    summed = parameter.summed_grad
    drawn = PLAN.noise_stddev * box_muller(NOISE, 0, 5_000)
    noisy = released(optimizer)
    assert torch.equal(noisy, (summed + drawn).float())
    assert not torch.equal(noisy, summed.float() + drawn.float())


def test_small_gradients_are_not_changed_and_examples_are_clipped_one_by_one():
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = optimizer_of(parameter, noise_multiplier=0.0, expected_batch_size=10)
    rows = torch.tensor([[0.1, 0, 0, 0], [3.0, 0, 0, 0], [0, 0, 7.0, 0]])
    parameter.grad_sample = rows
    optimizer.accumulate()
    expected = torch.tensor([0.1 + 0.3, 0, 0.3, 0]) / 10
    assert torch.allclose(released(optimizer), expected, atol=1e-6)


def test_divisor_is_the_expected_not_the_actual_batch_size():
    for count in (1, 3, 9):
        parameter = nn.Parameter(torch.zeros(2))
        optimizer = optimizer_of(parameter, noise_multiplier=0.0)
        parameter.grad_sample = torch.tensor([[0.0, 0.2]]).repeat(count, 1)
        optimizer.accumulate()
        expected = torch.tensor([0.0, 0.2 * count / PLAN.expected_batch_size])
        assert torch.allclose(released(optimizer), expected)


CONFIG = load(
    {},
    {
        "model.base_channels": 8,
        "model.attention_sizes": [4],
        "private_training.noise_multiplicity": 3,
    },
)


def perturbed_denoiser() -> nn.Module:
    denoiser = build_denoiser(CONFIG)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # Zero-initialised layers would hide the gradients of those below.
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def test_per_example_gradients_equal_one_example_at_a_time():
    denoiser, batch, copies = perturbed_denoiser(), 5, 3
    images = torch.rand(batch, 1, 8, 8) * 2 - 1
    labels, ids = torch.arange(batch), torch.arange(batch) + 40
    draws = draw("test", 0, ids, copies, (1, 8, 8), "cpu")
    reference = []
    for i in range(batch):
        denoiser.zero_grad()
        one = Draws(
            *(tensor[i : i + 1] for tensor in (draws.log_sigma, draws.noise, draws.dropout))
        )
        loss = edm_loss(
            denoiser, images[i : i + 1], labels[i : i + 1], one, CONFIG.diffusion, 0.1, 10
        )
        loss.sum().backward()
        reference.append([p.grad.clone() for p in denoiser.parameters()])
    denoiser.zero_grad()
    wrapped = PerExampleGradients(denoiser, copies)
    edm_loss(wrapped, images, labels, draws, CONFIG.diffusion, 0.1, 10).sum().backward()
    for index, parameter in enumerate(denoiser.parameters()):
        for i in range(batch):
            torch.testing.assert_close(
                parameter.grad_sample[i], reference[i][index], rtol=1e-4, atol=1e-5
            )
        assert parameter.grad is None  # No gradient of the whole batch is ever formed.


def test_draws_of_an_example_do_not_depend_on_the_rest_of_the_batch():
    ids = torch.tensor([4, 9, 17])
    together = draw("s", 5, ids, 2, (1, 4, 4), "cpu")
    alone = draw("s", 5, ids[1:2], 2, (1, 4, 4), "cpu")
    assert torch.equal(together.noise[1:2], alone.noise)
    assert torch.equal(together.log_sigma[1:2], alone.log_sigma)
    assert not torch.equal(together.noise[0], together.noise[1])
    assert not torch.equal(draw("s", 6, ids, 2, (1, 4, 4), "cpu").noise, together.noise)
    many = draw("s", 0, torch.arange(300), 4, (1, 8, 8), "cpu")
    assert is_normal(many.noise.numpy(), 1.0)
    assert abs(many.dropout.mean().item() - 0.5) < 0.05


def test_unsupported_layers_are_named_at_start():
    with pytest.raises(ConfigError, match=r"'1' \(BatchNorm2d\)"):
        PerExampleGradients(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), 1)
    with pytest.raises(ConfigError, match="'0'"):
        PerExampleGradients(nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)), 1)


def test_removed_hooks_leave_an_ordinary_module():
    denoiser = perturbed_denoiser()
    wrapped = PerExampleGradients(denoiser, 1)
    wrapped.remove_hooks()
    denoiser(
        torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long)
    ).sum().backward()
    assert all(parameter.grad is not None for parameter in denoiser.parameters())
