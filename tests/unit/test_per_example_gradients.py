"""Gradients of each example against autograd on one example at a time, for every kind of layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from torch import nn

from core.diffusion.unet import Attention
from core.errors import ConfigError
from core.privacy.mechanisms import convolution_gradients, per_example_gradients
from core.privacy.mechanisms.per_example_gradients import FreeParameter, PerExampleGradients

BATCH, COPIES = 4, 3


class Scaled(nn.Module):
    """A parameter of no other layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = FreeParameter(torch.tensor([1.0, -2.0, 0.5, 3.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale(x)[..., None, None]
        return torch.tanh(x * scale) + self.scale(x).square()[..., None, None]


def conv(*arguments: int, **settings: object) -> nn.Conv2d:
    return nn.Conv2d(*arguments, **settings)  # type: ignore[arg-type]


LAYERS = {
    "conv": lambda: conv(4, 6, 3, padding=1),
    "conv without bias": lambda: conv(4, 6, 3, bias=False),
    "conv with stride": lambda: conv(4, 6, 3, stride=2, padding=1),
    "conv with dilation": lambda: conv(4, 6, 3, dilation=2, padding=2),
    "conv to one channel": lambda: conv(4, 1, 3, padding=1),
    "conv 1x1": lambda: conv(4, 6, 1),
    "conv 1x1 with stride": lambda: conv(4, 6, 1, stride=2),
    "conv 2x3": lambda: conv(4, 6, (2, 3), stride=(2, 1), padding=(0, 1)),  # type: ignore[arg-type]
    "group norm": lambda: nn.GroupNorm(2, 4),
    "attention": lambda: Attention(4),
    "free parameter": Scaled,
    "linear on positions": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(36, 5)),
    "linear": lambda: nn.Sequential(nn.Flatten(1), nn.Linear(144, 5)),
    "embedding": lambda: nn.Sequential(Labels(), nn.Embedding(5, 4)),
    "a layer used twice": lambda: Twice(conv(4, 4, 3, padding=1)),
}


class Labels(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, 0, :3].abs().mul(10).long() % 5


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def layer_and_inputs(name: str, order: torch.memory_format) -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = LAYERS[name]()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        x = torch.randn(BATCH * COPIES, 4, 6, 6)
    return layer, x.contiguous(memory_format=order)


def loss(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x).float().square().sum() / 100


def one_at_a_time(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    rows = []
    for example in x.split(COPIES):
        layer.zero_grad()
        loss(layer, example).backward()
        rows.append([parameter.grad for parameter in layer.parameters()])
    layer.zero_grad()
    return [torch.stack(column) for column in zip(*rows, strict=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("way", ["a call for each example", "one call"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_the_gradients_of_one_example_at_a_time(name, way, order, monkeypatch):
    work = 0 if way == "a call for each example" else float("inf")
    monkeypatch.setattr(convolution_gradients, "_WORTH_A_CALL", work)
    layer, x = layer_and_inputs(name, order)
    x.requires_grad_(name != "embedding")
    expected = one_at_a_time(layer, x)
    expected_x, x.grad = x.grad, None
    loss(PerExampleGradients(layer, COPIES), x).backward()
    for parameter, reference in zip(layer.parameters(), expected, strict=True):
        assert parameter.grad is None  # No gradient of the whole batch is ever formed.
        assert parameter.grad_sample.shape == (BATCH, *parameter.shape)
        torch.testing.assert_close(parameter.grad_sample, reference, rtol=1e-5, atol=1e-5)
    if expected_x is not None:
        torch.testing.assert_close(x.grad, expected_x, rtol=1e-5, atol=1e-5)


def test_a_group_norm_of_more_groups_than_a_launch_takes_is_the_same_to_the_bit(monkeypatch):
    found = []
    for most in (65_535, 2 * BATCH * COPIES - 1, 5, 1):  # 24 groups: in 1, 2, 6 and 12 calls.
        monkeypatch.setattr(per_example_gradients, "_MOST_GROUPS", most)
        layer, x = layer_and_inputs("group norm", torch.contiguous_format)
        loss(PerExampleGradients(layer, COPIES), x.requires_grad_()).backward()
        assert x.grad is not None
        found.append([x.grad, *(parameter.grad_sample for parameter in layer.parameters())])
    for some in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(some, found[0], strict=True))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_under_bfloat16_autocast_gradients_are_within_its_error(name, order):
    layer, x = layer_and_inputs(name, order)
    expected = one_at_a_time(layer, x)
    wrapped = PerExampleGradients(layer, COPIES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(wrapped, x)
    value.backward()
    for parameter, reference in zip(layer.parameters(), expected, strict=True):
        error = (parameter.grad_sample.float() - reference).norm() / reference.norm()
        assert error < 2**-5  # A few roundings to 8 bits.


def test_gradients_are_those_of_opacus_summed_over_the_copies():
    def network() -> nn.Module:
        return nn.Sequential(conv(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), conv(8, 2, 3, stride=2))

    x = layer_and_inputs("conv", torch.contiguous_format)[1]
    ours = network()
    theirs = copy.deepcopy(ours)
    loss(PerExampleGradients(ours, COPIES), x).backward()
    loss(GradSampleModule(theirs, loss_reduction="sum"), x).backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        summed = other.grad_sample.unflatten(0, (BATCH, COPIES)).sum(1)
        torch.testing.assert_close(one.grad_sample, summed, rtol=1e-5, atol=1e-5)
        assert other.grad_sample.numel() == COPIES * one.grad_sample.numel()


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.gain = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.Sequential(conv(1, 2, 3), nn.BatchNorm2d(2)), r"'1' \(BatchNorm2d\)"),
        (nn.Sequential(nn.Linear(1, 2), nn.LayerNorm(2)), r"'1' \(LayerNorm\)"),
        (nn.ModuleDict({"a": nn.Conv1d(1, 2, 3)}), r"'a' \(Conv1d\)"),
        (nn.ModuleDict({"a": nn.MultiheadAttention(4, 1)}), r"'a' \(MultiheadAttention\)"),
        (nn.Sequential(conv(2, 2, 3, groups=2)), "'0'"),
        (nn.Sequential(conv(2, 2, 3, padding="same")), "'0'"),
        (nn.Sequential(conv(2, 2, 3, padding=1, padding_mode="circular")), "'0'"),
        (Bare(), r"'inner' \(Module\).*FreeParameter"),
    ],
)
def test_unsupported_layers_are_named_at_start(layer, named):
    with pytest.raises(ConfigError, match=named):
        PerExampleGradients(layer, 1)


def test_a_batch_that_is_no_multiple_of_the_copies_is_refused():
    with pytest.raises(ValueError, match="no multiple of K=2"):
        PerExampleGradients(nn.Linear(2, 2), 2)(torch.zeros(3, 2))


def test_frozen_parameters_get_no_gradient():
    layer = conv(4, 6, 3)
    layer.weight.requires_grad_(False)
    wrapped = PerExampleGradients(layer, 1)
    F.relu(wrapped(torch.ones(2, 4, 6, 6))).sum().backward()
    assert getattr(layer.weight, "grad_sample", None) is None
    assert layer.bias is not None
    assert layer.bias.grad_sample.shape == (2, 6)
