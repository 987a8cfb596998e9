"""Classifiers that learn from synthetic or real images: training and accuracy."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from core.data import Split, to_float
from core.errors import ConfigError
from core.evaluation.networks import NETWORKS

EpochScorer = Callable[[nn.Module, int], float]
"""How good a classifier is after an epoch, counted from 1; the same at every call."""
_WEIGHT_DECAY = 1e-2
_WARM_UP = 0.2
"""Share of the steps in which the learning rate rises."""


def synthetic_split(images: torch.Tensor, labels: torch.Tensor) -> tuple[Split, Split]:
    """Divides images into training and validation, class by class, without chance.

    Validation takes evenly spaced images of each class: a twelfth of them, rounded, at least one
    and never all; a class of one image is left to training. So it is in DPImageBench (Gong et al.
    2025): 55,000 of 60,000 images train, 5,000 validate.

    Args:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`.

    Returns:
        Training and validation split, both in the original order.

    Raises:
        ConfigError: no class has two images.
    """
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten().cpu()
        count = min(max(1, round(len(members) / 12)), len(members) - 1)
        spaced = (torch.arange(count, dtype=torch.float64) + 0.5) * (len(members) / max(count, 1))
        held_out[members[spaced.long()]] = True
    if not held_out.any():
        raise ConfigError(
            f"{len(labels)} images give no class two, so none can be held out for validation: "
            "raise evaluation.num_images to at least twice dataset.num_classes"
        )
    held_out = held_out.to(labels.device)
    return Split(images[~held_out], labels[~held_out]), Split(images[held_out], labels[held_out])


def train_classifier(
    train: Split,
    validation: Split | EpochScorer,
    num_classes: int,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    network: str = "cnn",
) -> nn.Module:
    """Trains a classifier and returns it as it was after its best epoch, in evaluation mode.

    AdamW; the learning rate rises linearly and falls along a cosine (Loshchilov and Hutter 2017).
    Best is the epoch with the highest accuracy on `validation`, the latest of equals. The same
    arguments give the same weights on the CPU, and on a GPU up to the order of its sums. The
    global random state is neither read nor changed.

    Args:
        train: images to learn from.
        validation: images that choose the epoch, or a judge of each.
        num_classes: labels lie in [0, num_classes).
        epochs: passes over `train`, >= 1.
        batch_size: >= 1.
        seed: of weights and order, in [0, 2**63).
        network: a key of `NETWORKS`.

    Raises:
        ValueError: a count is below 1, a split is empty, or the images are smaller than 8x8.

    Privacy: the weights depend on `train` and `validation` without protection; with real images
        they must not be released.
    """
    if min(epochs, batch_size, num_classes) < 1:
        raise ValueError(
            f"epochs={epochs}, batch_size={batch_size}, num_classes={num_classes}: all must be >= 1"
        )
    held_out = validation if isinstance(validation, Split) else train
    if not len(train.labels) or not len(held_out.labels):
        raise ValueError("the training and the validation split need at least one image each")
    generator = torch.Generator().manual_seed(seed)
    _, channels, height, width = train.images.shape
    kind = NETWORKS[network]
    model = kind.build(channels, (height, width), num_classes, generator).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=_WEIGHT_DECAY)
    total = epochs * math.ceil(len(train.labels) / batch_size)
    step, best, best_state = 0, -1.0, model.state_dict()
    for epoch in range(1, epochs + 1):
        model.train()
        order = torch.randperm(len(train.labels), generator=generator)
        for index in order.split(batch_size):
            for group in optimizer.param_groups:
                group["lr"] = kind.learning_rate * learning_rate_factor(step, total)
            with torch.enable_grad():
                logits = model(to_float(train.images[index].to(device)))
                loss = F.cross_entropy(logits, train.labels[index].to(device))
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            step += 1
        if isinstance(validation, Split):
            score = accuracy(model, validation, batch_size)
        else:
            score = validation(model, epoch)
        if score >= best:
            best = score
            best_state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(best_state)
    return model.eval()


def learning_rate_factor(step: int, total: int) -> float:
    """Share of the peak learning rate, in (0, 1], at `step` of `total`, counted from 0."""
    warm_up = max(1, round(_WARM_UP * total))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (total - warm_up)))


def accuracy(model: nn.Module, split: Split, batch_size: int) -> float:
    """Share in [0, 1] of the images of `split` whose largest logit is their label.

    Args:
        model: see `predictions`.
        batch_size: images at once, >= 1.

    Raises:
        ValueError: the split is empty.

    Privacy: with real images the result is not private.
    """
    if not len(split.labels):
        raise ValueError("accuracy needs at least one image")
    return count_correct(model, split, batch_size) / len(split.labels)


def count_correct(model: nn.Module, split: Split, batch_size: int) -> int:
    """Number of images of `split` whose largest logit is their label.

    Args:
        model: see `predictions`.
        batch_size: images at once, >= 1.

    Privacy: one image changes the number by at most 1; with real images it is not private until
        noise is added.
    """
    return int((predictions(model, split, batch_size) == split.labels.cpu()).sum())


@torch.no_grad()
def predictions(model: nn.Module, split: Split, batch_size: int) -> torch.Tensor:
    """Label of the largest logit of each image, int64 `[N]` on the CPU.

    Args:
        model: maps images `[B, C, H, W]` in [0, 1] to logits; judged in evaluation mode, left in
            the mode it was in.
        batch_size: images at once, >= 1.

    Privacy: each depends on its own image alone; of real images they are not private.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts = split.images.split(batch_size)
    found = [model(to_float(images.to(device))).argmax(dim=1).cpu() for images in parts]
    model.train(was_training)
    return torch.cat(found)
