"""DP-AdamBC against the paper's formulas written out, and against Adam."""

import io
import math

import pytest
import torch
from torch import nn

from core.privacy.mechanisms.adam_bc import DpAdamBc
from core.privacy.plan.plan import DpSgdPlan

RATE, FLOOR = 0.01, 0.1
SHAPES = ((3, 4), (5,))


def plan_of(noise_multiplier: float) -> DpSgdPlan:
    return DpSgdPlan(
        num_steps=1,
        sample_rate=0.1,
        noise_multiplier=noise_multiplier,
        max_grad_norm=0.5,
        expected_batch_size=4,
    )


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in SHAPES]


def follow(
    optimizer: torch.optim.Optimizer, targets: list[nn.Parameter], first: int, last: int
) -> torch.Tensor:
    """Steps with the gradients of the numbers `first` to `last - 1`; returns where it ends."""
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for target in targets:
            draws = torch.randn(target.shape, generator=generator, dtype=torch.float64)
            target.grad = 0.3 * draws + 0.2
        optimizer.step()
    return torch.cat([target.detach().flatten() for target in targets])


def test_steps_are_those_of_the_paper():
    mine = parameters()
    found = follow(DpAdamBc(mine, RATE, plan_of(2.0), FLOOR), mine, 0, 30)
    noise_variance = (2.0 * 0.5 / 4) ** 2  # (sigma C / B)^2
    floored = 0
    expected = []
    for index, shape in enumerate(SHAPES):
        theta = [1.0] * math.prod(shape)
        m, v = [0.0] * len(theta), [0.0] * len(theta)
        for t in range(1, 31):
            generator = torch.Generator().manual_seed(t - 1)
            draws = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
            for i, draw in enumerate(draws[index].flatten().tolist()):
                g = 0.3 * draw + 0.2
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.999 * v[i] + 0.001 * g * g
                corrected = v[i] / (1 - 0.999**t) - noise_variance
                floored += corrected < FLOOR * noise_variance
                root = math.sqrt(max(corrected, FLOOR * noise_variance)) + 1e-8
                theta[i] -= RATE * m[i] / (1 - 0.9**t) / root
        expected += theta
    assert 10 < floored < 400  # Both branches were walked.
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_without_noise_it_is_adam_and_with_noise_it_is_not():
    ends = {}
    for name in ("adam", "quiet", "noisy", "other"):
        mine = parameters()
        optimizer: torch.optim.Optimizer = torch.optim.Adam(mine, lr=RATE)
        if name != "adam":
            multiplier = {"quiet": 0.0, "noisy": 2.0, "other": 3.0}[name]
            optimizer = DpAdamBc(mine, RATE, plan_of(multiplier), FLOOR)
        ends[name] = follow(optimizer, mine, 0, 40)
    torch.testing.assert_close(ends["quiet"], ends["adam"], rtol=1e-12, atol=0)
    assert (ends["noisy"] - ends["adam"]).abs().max() > RATE
    assert (ends["noisy"] - ends["other"]).abs().max() > RATE / 10


def test_noise_of_known_variance_leaves_the_signal():
    """Under noise of 2.5 times a constant gradient, steps are as long as without noise."""
    signal, plan = 0.1, plan_of(2.0)
    noise = plan.noise_stddev / plan.expected_batch_size
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(1_500, 400, generator=generator) * noise + signal
    moved = {}
    for wrong in (1.0, 2 / 3, 3 / 2, 0.0):
        mine = nn.Parameter(torch.zeros(400))
        optimizer = DpAdamBc([mine], RATE, plan_of(2.0 * wrong), 1e-3)
        for gradient in gradients:
            before = mine.detach().clone()
            mine.grad = gradient
            optimizer.step()
        moved[wrong] = (before - mine.detach()).mean().item() / RATE
    assert moved.pop(1.0) == pytest.approx(1.0, abs=0.2)
    assert all(abs(length - 1.0) > 0.4 for length in moved.values())


@pytest.mark.parametrize("at", [1, 17])
def test_it_goes_on_exactly_from_its_state(at):
    whole = parameters()
    expected = follow(DpAdamBc(whole, RATE, plan_of(2.0), FLOOR), whole, 0, 40)
    mine = parameters()
    first = DpAdamBc(mine, RATE, plan_of(2.0), FLOOR)
    follow(first, mine, 0, at)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    second = DpAdamBc(mine, RATE, plan_of(2.0), FLOOR)
    second.load_state_dict(kept)
    assert torch.equal(follow(second, mine, at, 40), expected)
