"""Proposal of a configuration for images of one's own: every choice with the reason for it.

Privacy: a choice depends on public facts alone: N, classes, format, target, device and time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any

from core.commands.probe import StageSeconds
from core.config import Config, DatasetConfig, load, yaml_subset
from core.errors import printable
from core.privacy.plan.plan import PrivacyPlan

NUM_TRIALS = 4
_MOST_EPOCHS = 150
"""Passes of DP-SGD over the data, as in the published runs."""
_FEWEST_FOR_MOMENTS, _LARGEST_FOR_MOMENTS = 100, 32
"""Images of a class, and side of an image, of which moments were measured."""
_NOISY_PIXEL, _NOISY_STEP = 0.25, 0.02
"""Noise of a central image's pixel, of the range 0 to 1, and noise over batch of DP-SGD, above
which hardly anything is learned."""


@dataclass(frozen=True)
class Proposal:
    """Choices by dotted key, each a value and why.

    Attributes:
        classes: names, which are public with every release.
    """

    choices: Mapping[str, tuple[Any, str]]
    classes: tuple[str, ...]

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return load({}, {key: value for key, (value, _) in self.choices.items()})

    def changed(self, key: str, value: Any, why: str) -> "Proposal":
        """The same with another choice."""
        return replace(self, choices={**self.choices, key: (value, why)})

    def in_time(self, seconds: float, speed: StageSeconds) -> "Proposal":
        """The same with as many steps as a run of that many seconds has time for."""
        config = self.config
        drawing = speed.image * config.evaluation.num_images
        training = max(0.8 * seconds - drawing, 0.3 * seconds)
        split = config.stage_split
        steps = training / (split * speed.warm_up + (1 - split) * speed.private_training)
        batch, count = config.private_training.expected_batch_size, config.dataset.num_examples
        most = _MOST_EPOCHS * count / batch / (1 - split)
        number = max(10, int(_plain(min(steps, most))))
        why = f"as many as {seconds / 60:.3g} minutes allow here, or {_MOST_EPOCHS} passes"
        return self.changed("training.num_steps", number, why)

    def too_small(self, plan: PrivacyPlan) -> list[str]:
        """Why the result would hardly be worth the effort; empty if nothing is against it."""
        reasons: list[str] = []
        if (central := plan.central) is not None:
            noise = central.noise_stddev / central.expected_class_count
            if noise > _NOISY_PIXEL:
                reasons.append(
                    f"a pixel of a central image has noise {noise:.2g} on a range of 1, as it is "
                    f"of {central.expected_class_count:.0f} images (above {_NOISY_PIXEL} shapes "
                    "are lost): more images of each class, fewer classes or a larger epsilon help"
                )
        ratio = plan.dp_sgd.noise_multiplier / plan.dp_sgd.expected_batch_size
        if ratio > _NOISY_STEP:
            reasons.append(
                f"DP-SGD's noise over batch is {ratio:.2g} (above {_NOISY_STEP} little is learned; "
                "the digits of quickstart have 0.006): more images or a larger epsilon help"
            )
        return reasons

    def run_text(self) -> str:
        """The configuration as YAML, a comment above each choice."""
        lines = ["# A run on images of one's own; each choice with its reason. Change any."]
        sections: dict[str, list[str]] = {}
        for key, (value, why) in self.choices.items():
            section, _, leaf = key.rpartition(".")
            indent = "  " * bool(section)
            line = indent + yaml_subset.dump({leaf: value}).rstrip()
            sections.setdefault(section, []).extend([f"{indent}# {printable(why)}", line])
        for section, its_lines in sections.items():
            lines += [f"{section}:"] * bool(section) + its_lines
        return "\n".join(lines) + "\n"

    def sweep_text(self, name: str, base: str, cores: int, has_gpu: bool) -> str:
        """A sweep over the split of the budget, around the run in the file `base`."""
        noise = self.choices["central_images.noise_multiplier"][0]
        if self.config.uses_moments:
            count = f"""  # Clusters of each class: more show more, and have fewer images each.
  central_images.num_clusters:
    low: 1
    high: {max(6, 2 * self.config.central_images.num_clusters)}"""
        else:
            count = """  # Central images of each class: more show more, and cost more.
  central_images.per_class:
    low: 1
    high: 10"""
        workers = 1 if has_gpu else min(2, cores)
        return f"""# A sweep around {base}: which split of the budget is best.
{yaml_subset.dump({"name": name, "base": base}).rstrip()}
# A trial takes as long as the run; each spends the target, and the choice among them more.
num_trials: {NUM_TRIALS}
# Processes that share a trial's batch.
workers_per_trial: {workers}
gpus_per_worker: {int(has_gpu)}
search_space:
{count}
    log: true
  # Their noise: less shows more, and costs more.
  central_images.noise_multiplier:
    low: {max(0.5, noise / 4):g}
    high: {noise * 4:g}
    log: true
  # Share of the steps on images of the easy stage; 0 leaves all of them to DP-SGD.
  stage_split:
    low: 0.0
    high: 0.8
objective:
  # Of a classifier trained on synthetic images and tested on real ones; not private.
  metric: accuracy
"""


def propose(
    facts: DatasetConfig, classes: tuple[str, ...], epsilon: float, device: str
) -> Proposal:
    """All choices but the number of steps, which only a probe of the machine tells.

    Args:
        facts: public facts of the data, `image_size` among them.
        classes: their public names.
        epsilon: of one trial.
        device: `cpu` or `cuda`.
    """
    data = {
        "name": (facts.name, "how the folder is laid out"),
        "path": (facts.path, "where it lies"),
        "image_size": (facts.image_size, "pictures are cropped to a square and resized to it"),
        "channels": (facts.channels, "grey" if facts.channels == 1 else "colour"),
        "num_classes": (facts.num_classes, f"public, like their names: {', '.join(classes)}"),
        "num_examples": (facts.num_examples, "training images; public: epsilon rests on it"),
    }
    if facts.name == "parquet":
        data["image_column"] = (facts.image_column, "with the encoded pictures")
        data["label_column"] = (facts.label_column, "with the numbers of the classes")
    choices = {f"dataset.{key}": value for key, value in data.items()}
    budget = _budget(facts, epsilon)  # Which wins, where the start decides on the training.
    choices |= budget | _training(facts, device == "cuda") | budget
    return Proposal(choices, classes)


def _budget(facts: DatasetConfig, epsilon: float) -> dict[str, tuple[Any, str]]:
    """What is released, and at which noise."""
    count = facts.num_examples
    delta = _plain(1 / (count * math.log(count)))
    return {
        "privacy.target_epsilon": (epsilon, "what one trial may spend"),
        "privacy.target_delta": (
            delta,
            "1 / (N ln N), rounded down: below the chance to publish one record whole",
        ),
        **(_moments(facts, epsilon) if _suits_moments(facts) else _means(facts, epsilon)),
    }


def _suits_moments(facts: DatasetConfig) -> bool:
    """Whether the data is of the kind that moments were measured on, where they won by far."""
    enough = facts.num_examples >= _FEWEST_FOR_MOMENTS * facts.num_classes
    return enough and facts.channels == 1 and facts.image_size <= _LARGEST_FOR_MOMENTS


def _moments(facts: DatasetConfig, epsilon: float) -> dict[str, tuple[Any, str]]:
    """An easy stage like that of the small presets of moments, for as many images as there are."""
    side, each = facts.image_size, facts.num_examples // facts.num_classes
    return {
        "stage_split": (0.0, "the start in closed form needs no steps on images drawn from it"),
        "central_images.kind": (
            "moments",
            "means and covariances of clusters: 10 to 15 points of accuracy more than `mean` on "
            "MNIST and Fashion-MNIST (RESULTS.md); not measured in colour, which gets `mean`",
        ),
        "central_images.noise_multiplier": (
            _plain(max(1.0, 10 / epsilon)),
            "spends a third to a half alone, and DP-SGD hardly needs more noise for it",
        ),
        "central_images.image_size": (side, "whole images"),
        "central_images.pixel_center": (0.5, "halves the noise"),
        "central_images.max_norm": (_plain(side / 3), "most images' distance from the mean"),
        "central_images.num_components": (
            min(math.isqrt(each), side**2),
            "root of the images of a class: 12 for 144, 77 for 6,000",
        ),
        "central_images.num_clusters": (
            min(20, max(1, each // 300)),
            "300 images each or more, else their covariances are noise",
        ),
        "central_images.subspace_share": (0.1, "as in the small presets, like the next"),
        "central_images.class_mean_share": (0.3, "of the noise's precision, for clusters' means"),
        "diffusion.p_mean": (-1.5, "trains where the closed form is not exact"),
        "diffusion.p_std": (1.0, "as in the small presets"),
        "private_training.learning_rate": (
            4e-3,
            "as in the small presets of moments for epsilon 1",
        ),
        "sampler.sigma_max": (0.8, "drawing starts from noisy draws of the moments"),
    }


def _means(facts: DatasetConfig, epsilon: float) -> dict[str, tuple[Any, str]]:
    """The easy stage on mean images."""
    count, side = facts.num_examples, facts.image_size
    noise = _plain(min(1e6, max(2.0, 80 / epsilon)))
    small = side // 2 if side > 16 else side
    each, values = count / facts.num_classes, facts.channels * small**2
    while small > 8 and noise * math.sqrt(values) / 2 / each > _NOISY_PIXEL:
        small, values = small // 2, values // 4
    return {
        "stage_split": (0.4, "share of the steps on central images, which cost nothing more"),
        "central_images.per_class": (2, "averages of each class"),
        "central_images.noise_multiplier": (noise, "about a sixteenth of the budget"),
        "central_images.expected_batch_size": (count, "of all images: least noise in a pixel"),
        "central_images.image_size": (small, "rough shapes suffice; a smaller side has less noise"),
        "central_images.pixel_center": (0.5, "halves the noise"),
    }


def _training(facts: DatasetConfig, gpu: bool) -> dict[str, tuple[Any, str]]:
    """Network, batches and evaluation for a device."""
    count, side, classes = facts.num_examples, facts.image_size, facts.num_classes
    batch = 2 ** round(math.log2(count / 16)) if count > 16 else 1
    batch = min(max(batch, 32), 4096 if gpu else 512, count)
    patch = 2 if side >= 24 and not gpu else 1
    levels = [1, 2] if not gpu else [2, 4] if side < 64 else [1, 2, 4]
    drawn = max(2 * classes, min(count, 10_000 if gpu else 2000))
    return {
        "training.num_steps": (100, "replaced when the machine has been probed"),
        "training.ema_decay": (0.999 if gpu else 0.98, "averages some hundred steps, or fewer"),
        "warm_up.learning_rate": (1e-3, "as in the small presets"),
        "warm_up.augmentation": ("none", "it lost in the ablation of RESULTS.md"),
        "private_training.expected_batch_size": (batch, "a sixteenth of N, within what is fast"),
        "private_training.max_grad_norm": (0.1, "as in the small presets"),
        "private_training.noise_multiplicity": (8 if gpu else 2, "draws averaged for a gradient"),
        "private_training.learning_rate": (1e-3, "as in the small presets"),
        "private_training.max_physical_batch_size": ("auto", "what fits into memory"),
        "model.base_channels": (32 if gpu else 16, "a small network bears the noise better"),
        "model.channel_multipliers": (levels, "a level halves the side"),
        "model.patch_size": (patch, "pixels of a patch as channels are cheaper on a CPU"),
        "sampler.num_steps": (18 if gpu else 12, "of drawing an image"),
        "evaluation.num_images": (drawn, "as many as there are, up to what is quickly drawn"),
        "evaluation.batch_size": (500 if gpu else 100, "images drawn at a time"),
        "evaluation.fid_extractor": ("cnn", "needs no download; compares within these data alone"),
        "evaluation.classifier_epochs": (8, "as in the small presets"),
    }


def _plain(value: float, digits: int = 2) -> float:
    """Rounded down to so many significant digits."""
    return float(Context(prec=digits, rounding=ROUND_FLOOR).plus(Decimal(repr(value))))
