"""Every shipped preset against the published settings; nothing is stated in two files."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core.config import Config, flatten, load, load_yaml, yaml_subset
from core.diffusion.denoiser import build_denoiser
from core.errors import ConfigError
from core.privacy.plan.plan import check_feasible, estimated_noise_multiplier
from sweep.config.sweep import load_sweep

CORE, SWEEP = Path("core/configs"), Path("sweep/configs")
# Side, channels, classes, N, parameters, multipliers, attention, central count, noise, query
# batch and side, epochs and noise multiplicity of DP-SGD, sampler and its steps.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "mnist": (28, 1, 10, 60_000, 1_485_217, [2, 2], [14], 5, 5, 6_000, 14, 150, 32, "heun", 1000),
    "cifar10": (32, 3, 10, 50_000, 3.84e6, [2, 4], [16], 5, 5, 6_000, 16, 150, 32, "ddim", 250),
    "cifar100": (32, 3, 100, 50_000, 3.84e6, [2, 4], [16], 1, 5, 12_000, 16, 150, 32, "ddim", 250),
    "eurosat": (32, 3, 10, 23_000, 3.84e6, [2, 4], [16], 1, 5, 12_000, 16, 150, 32, "ddim", 250),
    "celeba_32": (
        *(32, 3, 2, 162_770, 3.84e6, [2, 4], [16]),
        *(250, 10, 12_000, 16, 150, 32, "ddim", 250),
    ),
    "celeba_64": (
        *(64, 3, 2, 162_770, 4.15e6, [1, 2, 4], [32, 16]),
        *(250, 10, 12_000, 16, 150, 4, "ddim", 250),
    ),
    "celeba_128": (
        *(128, 3, 2, 162_770, 4.15e6, [1, 2, 4], [64, 32]),
        *(250, 10, 12_000, 16, 150, 4, "ddim", 250),
    ),
    "camelyon17": (
        *(32, 3, 2, 302_436, 3.84e6, [2, 4], [16]),
        *(250, 10, 12_000, 16, 50, 32, "ddim", 250),
    ),
}
PUBLISHED["fashion_mnist"] = PUBLISHED["mnist"]
PRESETS = sorted(CORE.glob("*.yaml"))


def preset(name: str, **overrides: Any) -> Config:
    return load(CORE / f"{name}.yaml", {k.replace("__", "."): v for k, v in overrides.items()})


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_settings(name):
    config = preset(name)
    side, channels, classes, count, _, multipliers, attention, *rest = PUBLISHED[name]
    per_class, noise, query, central_side, epochs, copies, sampler, steps = rest
    data, central, private = config.dataset, config.central_images, config.private_training
    assert (data.image_size, data.channels, data.num_classes) == (side, channels, classes)
    assert data.num_examples == count
    assert config.privacy.target_epsilon == 10
    assert config.privacy.target_delta == pytest.approx(1 / (count * math.log(count)), rel=5e-4)
    assert list(config.model.channel_multipliers) == multipliers
    assert list(config.model.attention_sizes) == attention
    assert (config.model.base_channels, config.model.blocks_per_level) == (32, 2)
    assert (central.kind, central.per_class) == ("mean", per_class)
    assert (central.noise_multiplier, central.expected_batch_size) == (noise, query)
    assert (central.image_size, central.median_filter) == (central_side, True)
    assert central.sharpen == (channels == 1)
    assert 50 <= config.warm_up.batch_size <= 64
    seen = config.warm_up_steps * config.warm_up.batch_size
    assert seen == 2_000 * per_class * classes
    assert (config.warm_up.augmentation, config.warm_up.learning_rate) == ("rand_augment", 3e-4)
    assert private.expected_batch_size == 4096
    assert config.private_steps == epochs * count // 4096
    assert (private.noise_multiplicity, private.max_grad_norm) == (copies, 1)
    assert (private.learning_rate, config.training.ema_decay) == (3e-4, 0.999)
    assert config.training.label_dropout == 0.1
    assert (config.diffusion.p_mean, config.diffusion.p_std) == (-1.2, 1.2)
    assert config.diffusion.sigma_data == pytest.approx(3**-0.5)
    assert (config.sampler.name, config.sampler.num_steps) == (sampler, steps)
    assert config.sampler.s_churn == (10 if sampler == "heun" else 0)
    assert config.evaluation.num_images == 60_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_network_has_the_published_size(name):
    with torch.device("meta"):
        denoiser = build_denoiser(preset(name))
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    assert count == pytest.approx(PUBLISHED[name][4], rel=0.02)


def test_a_forward_pass_costs_the_published_number_of_products():
    with torch.device("meta"):
        denoiser = build_denoiser(preset("mnist"))
        images, sigma = torch.empty(1, 1, 28, 28), torch.empty(1)
        labels = torch.empty(1, dtype=torch.long)
        counter = FlopCounterMode(display=False)
        with counter:
            denoiser(images, sigma, labels)
    assert counter.get_total_flops() / 2 == pytest.approx(0.60e9, rel=0.1)


@pytest.mark.parametrize("epsilon", [1, 10])
@pytest.mark.parametrize("name", PUBLISHED)
def test_both_published_budgets_can_pay(name, epsilon):
    check_feasible(preset(name, privacy__target_epsilon=epsilon))


@pytest.mark.parametrize(("epsilon", "noise"), [(1, 13.55), (10, 1.8666)])
def test_noise_of_the_mnist_preset_is_that_computed_elsewhere(epsilon, noise):
    config = preset("mnist", privacy__target_epsilon=epsilon)
    assert estimated_noise_multiplier(config) == pytest.approx(noise, rel=0.01)


@pytest.mark.parametrize("path", [*PRESETS, *sorted(SWEEP.glob("*.yaml"))], ids=str)
def test_presets_are_short_and_repeat_nothing_that_they_inherit(path):
    assert len(path.read_text().splitlines()) <= 45
    own = yaml_subset.parse(path.read_text())
    if parent := own.pop("inherits", None):
        inherited = _leaves(load_yaml(path.parent / parent))
        repeated = {key for key, value in _leaves(own).items() if inherited.get(key) == value}
        assert not repeated


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        both = (
            _leaves(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
        )
        leaves |= both
    return leaves


SWEEPS = [path for path in sorted(SWEEP.glob("*.yaml")) if not path.stem.endswith("_grid")]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_search_the_three_numbers_around_their_preset(path):
    sweep = load_sweep(path, {})
    assert sweep.name == path.stem
    count = "num_clusters" if sweep.run.uses_moments else "per_class"
    for key in (f"central_images.{count}", "central_images.noise_multiplier", "stage_split"):
        assert key in sweep.search_space
    if path.stem in PUBLISHED:
        assert flatten(sweep.run) == flatten(preset(path.stem))
        for key, published in (("per_class", 7), ("noise_multiplier", 8)):
            dimension = sweep.search_space[f"central_images.{key}"]
            assert dimension.low is not None
            assert dimension.high is not None
            assert dimension.low <= PUBLISHED[path.stem][published] <= dimension.high


def test_a_file_inherits_and_overrides(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.yaml").write_text("seed: 1\nmodel:\n  base_channels: 8\n")
    (tmp_path / "b.yaml").write_text("inherits: below/a.yaml\nmodel:\n  patch_size: 2\n")
    (tmp_path / "c.yaml").write_text("inherits: b.yaml\nseed: 2\n")
    assert load_yaml(tmp_path / "c.yaml") == {
        "seed": 2,
        "model": {"base_channels": 8, "patch_size": 2},
    }
    assert load(tmp_path / "c.yaml").model.base_channels == 8


def test_a_file_cannot_inherit_from_itself_or_from_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("inherits: b.yaml\n")
    (tmp_path / "b.yaml").write_text("inherits: a.yaml\n")
    with pytest.raises(ConfigError, match="inherits from itself: remove one"):
        load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("inherits: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"no configuration file at '.*nowhere\.yaml'"):
        load(tmp_path / "a.yaml")
