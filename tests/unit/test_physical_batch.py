"""The physical batch: found by halving, remembered, and without influence on the result."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from core.config import Config, load
from core.data import Split
from core.diffusion.denoiser import build_denoiser
from core.errors import ConfigError
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms.dp_sgd import DpSgdOptimizer
from core.privacy.plan.plan import DpSgdPlan
from core.training.physical_batch import PhysicalBatches
from core.training.stages import private_stage

PLAN = DpSgdPlan(
    num_steps=2, sample_rate=0.9, noise_multiplier=1.0, max_grad_norm=0.5, expected_batch_size=30
)


def config_of(folder: Path, size: object = "auto", **changes: object) -> Config:
    base = {
        "private_training.max_physical_batch_size": size,
        "private_training.noise_multiplicity": 2,
        "model.base_channels": 8,
        "runtime.cache": str(folder),
        "runtime.device": "cpu",
    }
    return load({}, base | {key.replace("__", "."): value for key, value in changes.items()})


class Device:
    """Memory for `most` images; counts the attempts."""

    def __init__(self, most: int, error: RuntimeError | None = None) -> None:
        self.most = most
        self.error = error or torch.OutOfMemoryError("simulated")
        self.attempts: list[int] = []

    def __call__(self, part: torch.Tensor) -> list[int]:
        self.attempts.append(len(part))
        if len(part) > self.most:
            raise self.error
        return part.tolist()


def step(batches: PhysicalBatches, device: Device, count: int = 100) -> list[int]:
    given_up: list[None] = []
    device.attempts.clear()
    parts = list(batches.run(device, torch.arange(count), lambda: given_up.append(None)))
    assert len(given_up) == sum(attempt > device.most for attempt in device.attempts)
    return [identity for part in parts for identity in part]


def run(config: Config, device: Device, count: int = 100, steps: int = 1) -> list[int]:
    batches = PhysicalBatches(config, "cpu")
    for _ in range(steps - 1):
        step(batches, device, count)
    return step(batches, device, count)


def kept(folder: Path) -> int | None:
    (path,) = [*folder.glob("physical_batch-*.json")] or [None]
    return json.loads(path.read_text())["size"] if path else None


def test_the_size_is_halved_until_it_fits_and_remembered(tmp_path):
    first, second, other = Device(10), Device(10), Device(1000)
    batches = PhysicalBatches(config_of(tmp_path), "cpu")
    assert step(batches, first) == list(range(100))
    assert first.attempts == [64, 32, 16, *[8] * 12, 4]
    for size in (None, 8):  # What two whole steps have proved.
        step(batches, first)
        assert kept(tmp_path) == size
    assert run(config_of(tmp_path), second) == list(range(100))
    assert second.attempts == [*[8] * 12, 4]
    for changes in ({"model__base_channels": 16}, {"training__precision": "bfloat16"}):
        other.attempts.clear()
        run(config_of(tmp_path, **changes), other, steps=2)
        assert other.attempts == [64, 36]  # What was found for another network is not taken.
    assert run(config_of(tmp_path), Device(1), count=0) == []


def test_a_shortage_that_another_caused_does_not_last(tmp_path):
    """Neither of a whole batch's last, small part, nor for what is kept."""
    batches, small, large = PhysicalBatches(config_of(tmp_path), "cpu"), Device(3), Device(1000)
    step(batches, large, 64)
    step(batches, small, 4)
    assert small.attempts == [4, 4, 4, 4, 4, 2, 2]
    assert batches.size == 2
    for _ in range(5 * 101):
        step(batches, large)
    assert batches.size == 64
    assert kept(tmp_path) == 64
    room = Device(40)
    for _ in range(300):
        step(batches, room)
    assert kept(tmp_path) == 32  # Where there is no more room, a try now and then changes nothing.


def test_a_batch_smaller_than_the_size_proves_nothing(tmp_path):
    device = Device(10)
    run(config_of(tmp_path), device, count=20, steps=3)
    assert kept(tmp_path) == 8
    batches = PhysicalBatches(config_of(tmp_path), "cpu")
    for _ in range(300):
        step(batches, device, 5)
    assert (batches.size, kept(tmp_path)) == (8, 8)


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("GET was unable to find an engine to execute this computation", True),
        ("CUDA error: invalid configuration argument", False),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_full_memory_has_many_names(tmp_path, text, full):
    device = Device(10, RuntimeError(text))
    if full:
        assert run(config_of(tmp_path), device) == list(range(100))
    else:
        with pytest.raises(RuntimeError, match=text):
            PhysicalBatches(config_of(tmp_path), "cpu").run(
                device, torch.arange(100), lambda: pytest.fail("given up")
            ).__next__()
        assert device.attempts == [64]


def test_a_damaged_memory_is_found_anew(tmp_path):
    for text in ("", "[]", '{"size": 0}', '{"size": "8"}'):
        run(config_of(tmp_path), Device(10), steps=3)
        (path,) = tmp_path.glob("physical_batch-*.json")
        assert json.loads(path.read_text()) == {"size": 8}
        path.write_text(text)
        device = Device(1000)
        run(config_of(tmp_path), device)
        assert device.attempts == [64, 36]


def test_what_returns_nothing_is_computed_once_a_part(tmp_path):
    parts = PhysicalBatches(config_of(tmp_path, 3), "cpu").run(
        lambda part: None, torch.arange(7), lambda: pytest.fail("given up")
    )
    assert [*parts] == [None] * 3


def test_a_given_size_is_kept_and_one_image_too_many_is_an_error(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        run(config_of(tmp_path, 32), Device(10))
    with pytest.raises(torch.OutOfMemoryError):
        run(config_of(tmp_path), Device(0))
    with pytest.raises(ConfigError, match=r"max_physical_batch_size.*integer in \[1, inf\) or one"):
        config_of(tmp_path, "most")


@pytest.mark.parametrize("where", ["forward", "clipping"])
def test_running_out_of_memory_does_not_change_a_step(tmp_path, monkeypatch, where):
    """Wherever memory runs out, no example is lost or counted twice."""
    images = torch.randint(0, 256, (14, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    split = Split(images.byte(), torch.arange(14) % 10)

    def trained(size: object, most: int) -> tuple[torch.Tensor, list[float]]:
        config = config_of(tmp_path / str(size), size)
        denoiser = build_denoiser(config)
        stage = private_stage(
            config,
            denoiser,
            split,
            PLAN,
            KeyedStream(b"m" * 32),
            KeyedStream(b"n" * 32),
            lambda _: None,
        )
        with pytest.MonkeyPatch.context() as patch:
            if where == "forward":
                network = denoiser.network.forward

                def forward(x: torch.Tensor, *conditions: torch.Tensor) -> torch.Tensor:
                    if len(x) > 2 * most:
                        raise torch.OutOfMemoryError("simulated")
                    return network(x, *conditions)

                patch.setattr(denoiser.network, "forward", forward)
            else:
                nan_to_num, calls = torch.Tensor.nan_to_num_, [0]

                def fails(row: torch.Tensor, *values: float) -> torch.Tensor:
                    calls[0] += 1
                    if len(row) > most and calls[0] % 7 == 0:  # With some sums done already.
                        raise torch.OutOfMemoryError("simulated")
                    return nan_to_num(row, *values)

                patch.setattr(torch.Tensor, "nan_to_num_", fails)
            losses = [float(stage.step(number)) for number in range(2)]
        return nn.utils.parameters_to_vector(denoiser.parameters()).detach(), losses

    expected, losses = trained(64, 64)
    found, same = trained("auto", 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert same == pytest.approx(losses, rel=1e-5)


def test_sums_change_altogether_or_not_at_all(monkeypatch):
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    optimizer = DpSgdOptimizer(
        torch.optim.SGD([first, second], lr=1.0), PLAN, KeyedStream(b"n" * 32)
    )
    first.grad_sample, second.grad_sample = torch.ones(4, 3), torch.ones(4, 2)
    nan_to_num = torch.Tensor.nan_to_num_

    def fails(row: torch.Tensor, *values: float) -> torch.Tensor:
        if row.shape[1] == 2:
            raise torch.OutOfMemoryError("simulated")
        return nan_to_num(row, *values)

    monkeypatch.setattr(torch.Tensor, "nan_to_num_", fails)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.accumulate()
    assert first.summed_grad is None
    assert second.summed_grad is None
