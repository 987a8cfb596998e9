"""Averages rebuilt from snapshots against the same average tracked directly."""

import numpy as np
import pytest
import torch
from torch import nn

from core.diffusion import ema as averages
from core.diffusion.ema import Ema, PowerAverages, exponent, weights
from core.diffusion.posthoc_ema import combination, keep_snapshot, reconstruct
from core.errors import ConfigError

STEPS = 180


@pytest.mark.parametrize("sigma_rel", [0.04, 0.1, 0.25])
def test_weights_have_the_width_that_names_them(sigma_rel):
    share = weights(sigma_rel, 4_000, 5_000)
    assert share.sum() == pytest.approx(1.0)
    assert not share[4_000:].any()
    time = (np.arange(5_000) + 0.5) / 4_000
    mean = (share * time).sum()
    assert (share * (time - mean) ** 2).sum() ** 0.5 == pytest.approx(sigma_rel, rel=1e-3)


def trajectory() -> torch.Tensor:
    """Parameters that drift and jitter, `[STEPS, 50]`."""
    steps = torch.randn(STEPS, 50, generator=torch.Generator().manual_seed(1))
    return steps.cumsum(0) / STEPS**0.5 + steps


def module_of(values: torch.Tensor) -> nn.Linear:
    module = nn.Linear(50, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(values[None])
    return module


def trained(folder, resumed_at: int = 0) -> Ema:
    path = trajectory()
    ema = Ema(module_of(path[0]), 0.9, posthoc=True)
    for number, values in enumerate(path):
        if number == resumed_at:
            state = ema.state_dict()
            ema = Ema(module_of(path[0]), 0.9, posthoc=True)
            ema.load_state_dict(state)
        ema.update(module_of(values))
        assert ema.power is not None
        keep_snapshot(ema.power, number + 1, STEPS, folder)
    return ema


def test_tracked_averages_are_their_weights_and_resume_exactly(tmp_path):
    whole, resumed = trained(tmp_path).power, trained(tmp_path, resumed_at=70).power
    assert whole is not None
    assert resumed is not None
    assert torch.equal(whole.values, resumed.values)
    for values, length in zip(whole.values, averages.TRACKED, strict=True):
        expected = torch.from_numpy(weights(length, STEPS, STEPS)).float() @ trajectory()
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert len(list(tmp_path.iterdir())) == averages.NUM_SNAPSHOTS


@pytest.mark.parametrize("length", [0.04, 0.05, 0.07, 0.13, 0.2, 0.25])
def test_a_rebuilt_average_is_that_tracked_directly(length, tmp_path, monkeypatch):
    trained(tmp_path)
    monkeypatch.setattr(averages, "TRACKED", (length, 0.1))
    direct = PowerAverages(module_of(trajectory()[0]))
    for values in trajectory():
        direct.update(module_of(values))
    monkeypatch.undo()
    rebuilt = module_of(torch.zeros(50))
    reconstruct(rebuilt, tmp_path, STEPS, length)
    found, wanted = rebuilt.weight[0].detach(), direct.values[0]
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    if length not in averages.TRACKED:  # Neither tracked average would do.
        final = torch.load(tmp_path / f"{STEPS:08d}.pt", weights_only=True)
        assert all((kept - wanted).norm() > 2 * (found - wanted).norm() for kept in final)


def test_lengths_out_of_range_and_missing_snapshots_are_refused(tmp_path):
    module = module_of(torch.zeros(50))
    with pytest.raises(ConfigError, match=r"--ema-length=0\.5 must lie in \[0\.04, 0\.25\]"):
        reconstruct(module, tmp_path, STEPS, 0.5)
    with pytest.raises(ConfigError, match=r"training\.posthoc_ema=true"):
        reconstruct(module, tmp_path, STEPS, 0.1)
    trained(tmp_path)
    for path in sorted(tmp_path.glob("*.pt"))[:-1]:
        path.unlink()
    with pytest.raises(ConfigError, match="the 1 snapshots"):
        reconstruct(module, tmp_path, STEPS, 0.1)
    reconstruct(module, tmp_path, STEPS, 0.05)
    assert combination(0.05, [STEPS], STEPS)[1] < 1e-6
    assert exponent(0.05) > exponent(0.2) > 0
