"""Python runs this at its start: workers whose memory holds no more than seven images."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from late import Late

MOST_IMAGES = 7


def spoil(training) -> None:
    import torch

    loss = training._loss

    def greedy_loss(config, network, weight_of, images, *others):
        if isinstance(network, training.PerExampleGradients) and len(images) > MOST_IMAGES:
            raise torch.OutOfMemoryError("simulated")
        return loss(config, network, weight_of, images, *others)

    training._loss = greedy_loss


Late("core.training.stages", spoil)
