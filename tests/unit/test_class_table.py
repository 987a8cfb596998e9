"""Which classes are lost: counts by class, the worst first, with what they are taken for."""

import torch
from torch import nn

from core.data import Dataset, Split
from core.evaluation.metrics import confusion
from core.publish.class_table import COLUMNS, class_rows


class Brightest(nn.Module):
    """Takes an image for the class of its brightest pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x.flatten(1)


def test_confusion_has_true_classes_down_and_predicted_ones_across():
    seen = torch.tensor([0, 1, 1, 2, 0])
    images = (255 * torch.eye(3)[seen]).to(torch.uint8).view(5, 1, 1, 3)
    test = Split(images, torch.tensor([0, 1, 0, 0, 2]))
    dataset = Dataset(test, test, "", ("a", "b", "c"))
    assert confusion(Brightest(), dataset, 3, 2) == [[1, 1, 1], [0, 1, 0], [1, 0, 0]]


def test_the_worst_class_comes_first_with_what_it_is_taken_for():
    classes = {
        "names": ["coat", "shirt", "bag", "none"],
        "synthetic": [[8, 2, 0, 0], [5, 2, 1, 0], [0, 0, 4, 0], [0, 0, 0, 0]],
        "real": [[9, 1, 0, 0], [1, 7, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0]],
    }
    assert class_rows(classes) == [
        ["shirt", "8", "25.0%", "87.5%", "coat 62%, bag 12%", "coat 12%"],
        ["coat", "10", "80.0%", "90.0%", "shirt 20%", "shirt 10%"],
        ["bag", "4", "100.0%", "100.0%", "-", "-"],
    ]
    assert all(len(row) == len(COLUMNS) for row in class_rows(classes))
