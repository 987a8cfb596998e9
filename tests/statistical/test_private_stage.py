"""The hard stage as it is run: what one record and the noise do to each released step."""

import dataclasses

import pytest
import torch
from checks import is_binomial, is_normal
from torch import nn

from core.config import load
from core.data import Split
from core.privacy.keys import KeyedStream
from core.privacy.plan.plan import DpSgdPlan
from core.training.stages import private_stage

MASKS, NOISE = KeyedStream(b"m" * 32), KeyedStream(b"n" * 32)
PLAN = DpSgdPlan(
    num_steps=7, sample_rate=0.3, noise_multiplier=1.5, max_grad_norm=0.2, expected_batch_size=16
)


class Tiny(nn.Module):
    """The least denoiser that has gradients; `unused` gives the noise room to be measured in."""

    def __init__(self, unused: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1, 1, 3, padding=1)
        self.unused = nn.Linear(1, unused, bias=False) if unused else None

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.mix(x)


@pytest.fixture(autouse=True)
def _plain_steps(monkeypatch):
    """Adam hides the scale of what it is given; with SGD a step is the released gradient."""
    monkeypatch.setattr(torch.optim, "Adam", lambda params, lr: torch.optim.SGD(params, lr=1.0))


def released(
    images: torch.Tensor, steps: int, copies: int = 1, unused: int = 0, **changes: float
) -> torch.Tensor:
    """What each of `steps` steps subtracts from the same start, times the public divisor."""
    plan = dataclasses.replace(PLAN, **changes)
    config = load(
        {},
        {
            "private_training.noise_multiplicity": copies,
            "private_training.max_physical_batch_size": 2,
            "runtime.device": "cpu",
        },
    )
    torch.manual_seed(0)
    network = Tiny(unused)
    start = nn.utils.parameters_to_vector(network.parameters()).detach().clone()
    split = Split(images, torch.zeros(len(images), dtype=torch.long))
    begun: list[int] = []
    stage = private_stage(config, network, split, plan, MASKS, NOISE, begun.append)  # type: ignore[arg-type]
    assert stage.num_steps == plan.num_steps
    rows = []
    for step in range(steps):
        nn.utils.vector_to_parameters(start.clone(), network.parameters())
        stage.step(step)
        rows.append(start - nn.utils.parameters_to_vector(network.parameters()).detach())
    assert begun == list(range(steps))  # What the ledger is told.
    return torch.stack(rows) * plan.expected_batch_size


def records(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("copies", [1, 6])
def test_a_record_enters_at_the_planned_rate_with_at_most_the_clip_norm(copies):
    steps, quiet = 500, {"noise_multiplier": 0.0}
    world, larger = records(5), torch.cat((records(5), torch.full((1, 1, 4, 4), 255).byte()))
    moved = released(larger, steps, copies, **quiet) - released(world, steps, copies, **quiet)
    norms = moved.norm(dim=1)
    assert norms.max() <= PLAN.max_grad_norm * (1 + 1e-4)  # Whatever the number of copies.
    entered = norms > 1e-5
    assert norms[entered].min() >= PLAN.max_grad_norm * (1 - 1e-3)  # Its gradient is larger.
    count, rate = int(entered.sum()), PLAN.sample_rate
    assert is_binomial(count, steps, rate)
    for wrong in (0.5 * rate, 1.5 * rate, 2 * rate):
        assert not is_binomial(count, steps, wrong)
    # Knowing one mask says nothing about the next.
    assert is_binomial(int((entered[1:] & entered[:-1]).sum()), steps - 1, rate**2)


def test_each_step_gets_noise_of_its_own_with_the_planned_scale():
    steps, planned = 100, PLAN.noise_multiplier * PLAN.max_grad_norm
    noise = released(records(2), steps, unused=2_000, sample_rate=1e-9)
    for values in (noise.numpy(), noise[:, :10].numpy()):
        assert is_normal(values, planned)
    assert is_normal((noise.sum(dim=0) / steps**0.5).numpy(), planned)
    assert not is_normal((noise[0] * steps**0.5).numpy(), planned)  # The sum of equal noise.
    for wrong in (0.5, 2**-0.5, 2 / 3, 0.98, 1.02, 3 / 2, 2.0):
        assert not is_normal(noise.numpy(), wrong * planned)


def test_noise_does_not_depend_on_the_data():
    with_data = released(records(6), 20) - released(records(6), 20, noise_multiplier=0.0)
    without = released(records(6), 20, sample_rate=1e-9)
    assert torch.allclose(with_data, without, atol=1e-5)
