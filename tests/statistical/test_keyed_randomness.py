"""Masks and noise: the right distribution, and only for the right key."""

import os

import numpy as np
import pytest
import torch
from checks import box_muller, is_binomial, is_normal

from core.errors import ConfigError
from core.privacy.keys import KeyedStream, MasterSecret
from core.privacy.mechanisms.sampling import PoissonSampler, rank_share

MASTER = MasterSecret(bytes(range(32)))
WHERE = {"fingerprint": "f", "trial": "t", "stage": "private_training", "purpose": "noise"}

FIXED = [0.34554932, -0.19796228, -0.54082274, -0.021751571]


def stream(**changes: str) -> KeyedStream:
    return KeyedStream(MASTER.derive(**(WHERE | changes)))


def test_noise_is_standard_normal_and_the_test_rejects_other_scales():
    values = stream().normal(0, 200_000).numpy()
    assert is_normal(values, 1.0)
    for wrong in (2 / 3, 0.5, 2**-0.5, 0.98, 1.02, 3 / 2, 2.0):
        assert not is_normal(wrong * values, 1.0)
    assert not is_normal(np.random.default_rng(0).uniform(-(3**0.5), 3**0.5, 200_000), 1.0)


def test_noise_of_different_steps_and_keys_is_independent():
    first = stream().normal(0, 100_000)
    others = [stream().normal(1, 100_000)]
    others += [stream(**{key: "other"}).normal(0, 100_000) for key in WHERE]
    for other in others:
        correlation = torch.corrcoef(torch.stack((first, other)))[0, 1]
        assert abs(correlation) < 5 / 100_000**0.5
        assert not torch.equal(first, other)


def test_replay_is_exact():
    assert torch.equal(stream().normal(7, 1001), stream().normal(7, 1001))


@pytest.mark.parametrize("count", [1, 1001, 2**14 + 6, 50_001])
def test_noise_is_that_of_box_and_muller_and_never_changes(count):
    """Other noise for the same key would be a second release when a run is resumed."""
    found = stream().normal(7, count)
    assert found.dtype == torch.float64  # Rounded only after it was added to a sum.
    torch.testing.assert_close(found, box_muller(stream(), 7, count), rtol=1e-12, atol=1e-14)
    fixed = KeyedStream(bytes(range(32))).normal(5, 4).tolist()
    assert fixed == pytest.approx(FIXED, rel=1e-6)


@pytest.mark.parametrize("rate", [0.001, 0.0683, 0.5, 0.9])
def test_inclusion_rate_and_independence_over_steps(rate):
    count, steps = 20_000, 10
    sampler = PoissonSampler(stream(purpose="mask"), count, rate)
    masks = torch.zeros(steps, count, dtype=torch.bool)
    for step in range(steps):
        masks[step, sampler.indices(step)] = True
    included = int(masks.sum())
    assert is_binomial(included, count * steps, rate)
    if rate > 0.01:
        assert not is_binomial(included, count * steps, 0.9 * rate)
        assert not is_binomial(included, count * steps, min(1.1 * rate, 1.0))
    both = int((masks[:-1] & masks[1:]).sum())
    assert is_binomial(both, count * (steps - 1), rate**2)


def test_batch_sizes_vary_as_poisson_sampling_says():
    sampler = PoissonSampler(stream(purpose="mask"), 1_000, 0.1)
    sizes = np.array([len(sampler.indices(step)) for step in range(2_000)])
    variance = sizes.var() / (1_000 * 0.1 * 0.9)
    assert 0.83 < variance < 1.19  # 5.4 standard deviations of a chi-square with 1,999 degrees.


def test_rate_one_takes_all_and_zero_is_refused():
    assert len(PoissonSampler(stream(), 100, 1.0).indices(3)) == 100
    for rate in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="sample_rate"):
            PoissonSampler(stream(), 100, rate)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_partition_the_global_batch(world_size):
    chosen = PoissonSampler(stream(), 1_000, 0.3).indices(0)
    parts = [rank_share(chosen, rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts).sort().values, chosen)


def test_secret_is_created_once_private_and_never_shown(tmp_path, monkeypatch):
    path = tmp_path / "keys" / "master.secret"
    monkeypatch.setenv("FETA_SWEEP_SECRET_FILE", str(path))
    first, second = MasterSecret.load(), MasterSecret.load()
    assert first.derive(**WHERE) == second.derive(**WHERE)
    assert path.stat().st_mode & 0o077 == 0
    assert path.read_text().strip() not in repr(first) + str(first) + repr(stream())
    path.write_text("not a secret")
    with pytest.raises(Exception, match="64 hexadecimal digits") as caught:
        MasterSecret.load()
    assert "not a secret" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o602, 0o666])
def test_a_secret_that_others_may_use_is_refused(tmp_path, monkeypatch, mode):
    path = tmp_path / "master.secret"
    monkeypatch.setenv("FETA_SWEEP_SECRET_FILE", str(path))
    MasterSecret.load()
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:o}.*chmod 600 '{path}'"):
        MasterSecret.load()
    path.chmod(0o400)
    MasterSecret.load()


def test_a_secret_that_another_user_lends_may_be_read_by_a_group(tmp_path, monkeypatch):
    """As Kubernetes mounts one."""
    path = tmp_path / "master.secret"
    monkeypatch.setenv("FETA_SWEEP_SECRET_FILE", str(path))
    MasterSecret.load()
    path.chmod(0o440)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    MasterSecret.load()
    path.chmod(0o444)
    with pytest.raises(ConfigError, match="may be used by others"):
        MasterSecret.load()


@pytest.mark.parametrize(
    "value",
    [
        bytes(32),
        b"\xff" * 32,
        b"0123456789abcdef" * 2,
        bytes(range(32)),
        bytes(range(0, 96, 3)),
        bytes.fromhex("deadbeef" * 8),
        bytes.fromhex("0123456789abcdef" * 4),
        np.random.default_rng(0).bytes(16) * 2,
        b"correct horse battery staple 123",
    ],
)
def test_a_secret_without_entropy_is_refused(tmp_path, monkeypatch, value):
    path = tmp_path / "master.secret"
    monkeypatch.setenv("FETA_SWEEP_SECRET_FILE", str(path))
    path.write_text(value.hex())
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="can be guessed: begin with 32 random bytes") as caught:
        MasterSecret.load()
    assert value.hex() not in str(caught.value)


def test_random_secrets_are_taken():
    numbers = np.random.default_rng(0)
    assert all(MasterSecret(numbers.bytes(32))._looks_random() for _ in range(20_000))


def test_a_shown_digest_depends_on_data_and_secret_and_gives_neither_away():
    first, second = MasterSecret(b"a" * 32), MasterSecret(b"b" * 32)
    shown = {first.keyed("x"), first.keyed("y"), second.keyed("x"), "x"}
    assert len(shown) == 4
    assert first.keyed("x") == MasterSecret(b"a" * 32).keyed("x")
    assert len(first.keyed("x")) == 64
