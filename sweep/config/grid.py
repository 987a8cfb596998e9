"""Grids: all combinations of choices, and a published one to draw beside them."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Any

from pydantic import Field

from core.config.network import Section
from sweep.config.scope import DEFAULT_NUM_TRIALS

NOISE_FACTOR = "noise_factor"
"""By how much a point raises the DP-SGD noise over that without an easy stage, for the same number
of DP-SGD steps: a figure of the privacy plan, so that drawing it needs no training."""
CANNOT_BE_PAID = "cannot_be_paid"
_PREFIX = "at_"

Choices = Mapping[str, Sequence[Any] | None]
"""By dotted key the values of a search space; None for an interval."""


class PublishedGrid(Section):
    """Figures that others published over the same two keys, to draw beside the sweep's own."""

    title: str = "published"
    source: Annotated[str, Field(min_length=1)]
    """Where the figures stand: authors, year, table or figure."""
    metric: Annotated[str, Field(min_length=1)]
    """As published, such as `fid`; `noise_factor` is solved here for comparison, too."""
    rows: str
    """Dotted key that differs from row to row."""
    columns: str
    values: dict[str, tuple[Annotated[float, Field(allow_inf_nan=False)] | str | None, ...]]
    """By `at_X`, for every choice X of the rows' key, a figure for every choice of the columns'
    key; null where none is published, `cannot_be_paid` where the budget is too small."""

    def lines(self, choices: Choices) -> list[tuple[float | str | None, ...]]:
        """The figures, row by row in the order of the choices."""
        return [self.values[f"{_PREFIX}{choice}"] for choice in choices[self.rows] or ()]


def grid_points(choices: Choices) -> list[dict[str, Any]]:
    """Every combination once; the last key's value changes first."""
    values = [each or () for each in choices.values()]
    return [dict(zip(choices, point, strict=True)) for point in product(*values)]


def default_num_trials(sampler: str, choices: Choices) -> int:
    """The most trials that a sweep has if no number is given."""
    return len(grid_points(choices)) if sampler == "grid" else DEFAULT_NUM_TRIALS


def two_keys(choices: Choices) -> tuple[str, str] | None:
    """Row key and column key of a grid that can be drawn; None for any other space."""
    first, *others = choices
    whole = all(each is not None for each in choices.values())
    return (first, others[0]) if len(others) == 1 and whole else None


def check_grid(
    sampler: str,
    choices: Choices,
    num_trials: int | None,
    published: PublishedGrid | None,
) -> None:
    """Refuses a grid without an end or with a point twice, and figures that do not fit it.

    Raises:
        ValueError: names the key and the remedy.
    """
    for key, values in choices.items() if sampler == "grid" else ():
        if values is None:
            raise ValueError(
                f"search_space.{key} is an interval, of which sampler='grid' knows no points: "
                "give choices"
            )
        if len(set(values)) < len(values):
            raise ValueError(f"search_space.{key}.choices={list(values)} names a value twice")
    size = len(grid_points(choices))
    if sampler == "grid" and num_trials is not None and num_trials > size:
        raise ValueError(
            f"num_trials={num_trials} exceeds the grid of {size} points: lower it, or leave it "
            "out to try all that the budget can pay"
        )
    if published is not None:
        _check_published(published, choices)


def _check_published(published: PublishedGrid, choices: Choices) -> None:
    keys = two_keys(choices)
    if keys is None or {published.rows, published.columns} != set(keys):
        raise ValueError(
            f"published has rows={published.rows!r} and columns={published.columns!r}, which must "
            "be the two keys of a search_space of choices: correct them, or set published=null"
        )
    rows, columns = choices[published.rows] or (), choices[published.columns] or ()
    names = [f"{_PREFIX}{choice}" for choice in rows]
    lengths = {len(line) for line in published.values.values()}
    if set(published.values) != set(names) or lengths != {len(columns)}:
        raise ValueError(
            f"published.values must hold {', '.join(names)} with {len(columns)} figures each, one "
            f"for each choice of {published.columns}: correct them, or set published=null"
        )
    words = {each for line in published.values.values() for each in line if isinstance(each, str)}
    if words - {CANNOT_BE_PAID}:
        raise ValueError(
            f"published.values holds {sorted(words)}: give numbers, null or {CANNOT_BE_PAID}"
        )
