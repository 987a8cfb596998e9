"""Table of classes for the owner of the data: which of them the synthetic images lose."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    "class",
    "test images",
    "accuracy, trained on synthetic",
    "accuracy, trained on real",
    "taken for, trained on synthetic",
    "taken for, trained on real",
)
_SHOWN = 3
"""Other classes that an image is taken for, the most frequent first."""


def class_rows(classes: Mapping[str, Any]) -> list[list[str]]:
    """A row of text for each class, that with the least accuracy of `synthetic` first.

    Args:
        classes: `names`, and under `synthetic` and `real` the confusion of the classifier trained
            on such images: counts of test images, true classes down, predicted ones across.

    Privacy: computed from real test images without protection: for the owner alone.
    """
    names, ours, theirs = classes["names"], classes["synthetic"], classes["real"]
    order = sorted(range(len(names)), key=lambda label: _share(ours[label], label))
    return [
        [
            names[label],
            str(sum(ours[label])),
            *(f"{_share(each[label], label):.1%}" for each in (ours, theirs)),
            *(_taken_for(each[label], label, names) for each in (ours, theirs)),
        ]
        for label in order
        if sum(ours[label])
    ]


def _share(counts: Sequence[int], label: int) -> float:
    return counts[label] / max(1, sum(counts))


def _taken_for(counts: Sequence[int], own: int, names: Sequence[str]) -> str:
    others = sorted({*range(len(names))} - {own}, key=lambda label: -counts[label])[:_SHOWN]
    found = [f"{names[i]} {_share(counts, i):.0%}" for i in others if counts[i]]
    return ", ".join(found) or "-"
