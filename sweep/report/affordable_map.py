"""Plot of count x noise: tried points, their scores, and what the budget cannot pay."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.interpolate import griddata

from core.config import flatten
from core.config.keys import NOISE
from core.config.metrics import DIRECTIONS
from sweep.config.sweep import SweepConfig
from sweep.report.effects import Boundary
from sweep.report.figures import LABELS, Figure, axis_ticks, scatter
from sweep.results.table import Row

MIN_TRIALS = 6
"""Fewer points span hardly any area to interpolate over."""
_CELLS = 40
_BEYOND = 1e9  # A noise multiplier that no space holds; infinity cannot be interpolated.


def affordable_map(
    sweep: SweepConfig,
    rows: Sequence[Row],
    winner: Row | None,
    boundary: Boundary,
    pruned: Sequence[dict[str, Any]],
) -> Figure:
    """Trials over count x noise on contours of the objective, the unaffordable region hatched.

    Args:
        rows: finished trials that have an easy stage.
        pruned: points that were never trained.
    """
    metric, count = sweep.objective.metric, sweep.count_key
    data: list[dict[str, Any]] = []
    if contour := _contour(sweep, rows, boundary):
        data.append(contour)
    if boundary.excludes_something:
        data.append(_barred(sweep, boundary))
    left_out = [point for point in pruned if count in point and NOISE in point]
    if left_out:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "pruned without compute",
                "x": [point[NOISE] for point in left_out],
                "y": [point[count] for point in left_out],
                "marker": {"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": "--ink"}},
                "hovertemplate": "pruned: count %{y}, noise %{x:.3g}<extra></extra>",
            }
        )
    points = scatter(
        rows,
        winner,
        lambda row: row.config.central_images.noise_multiplier,
        lambda row: flatten(row.config)[count],
    )
    for trace in points:  # On the contours' colours every point needs a rim.
        trace["marker"] = {**trace["marker"], "line": {"width": 1.5, "color": "--paper"}}
    return Figure(
        id="map",
        title=f"{metric} over count and noise",
        alt=f"{len(rows)} trials over count and noise with their {metric}; "
        f"{_edge_in_words(boundary)}",
        data=[*data, *points],
        layout={
            "xaxis": _axis(sweep, NOISE),
            "yaxis": _axis(sweep, count),
        },
        height=480,
    )


def _edge_in_words(boundary: Boundary) -> str:
    if not boundary.excludes_something:
        return "the budget can pay every point."
    parts = [
        f"{count} {'cannot be paid' if noise is None else f'needs noise {noise:.3g} or more'}"
        for count, noise in zip(boundary.counts, boundary.noises, strict=True)
    ]
    return f"what the budget can pay, by count: {', '.join(parts)}."


def _axis(sweep: SweepConfig, key: str) -> dict[str, Any]:
    dimension = sweep.search_space[key]
    assert dimension.low is not None
    assert dimension.high is not None
    low, high = float(dimension.low), float(dimension.high)
    if dimension.log:
        low, high = math.log10(low), math.log10(high)
    margin = 0.04 * (high - low)
    kind = "log" if dimension.log else "linear"
    return {
        "type": kind,
        "title": {"text": LABELS[key]},
        "range": [low - margin, high + margin],
        **axis_ticks(kind),
    }


def _barred(sweep: SweepConfig, boundary: Boundary) -> dict[str, Any]:
    """The region left of the boundary, as a polygon."""
    high = float(sweep.search_space[NOISE].high or 0)
    edge = [high if noise is None else noise for noise in boundary.noises]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "the budget cannot pay",
        "x": [*edge, boundary.low, boundary.low],
        "y": [*boundary.counts, boundary.counts[-1], boundary.counts[0]],
        "fill": "toself",
        "fillcolor": "--barred",
        "fillpattern": {"shape": "/", "fgcolor": "--soft", "bgcolor": "--barred", "size": 8},
        "line": {"color": "--ink", "width": 2, "dash": "dash"},
        "hoverinfo": "skip",
    }


def _contour(sweep: SweepConfig, rows: Sequence[Row], boundary: Boundary) -> dict[str, Any] | None:
    """The objective between the trials, linearly; None where they span no area or score alike."""
    metric = sweep.objective.metric
    at = np.array(
        [
            (row.config.central_images.noise_multiplier, flatten(row.config)[sweep.count_key])
            for row in rows
        ],
        dtype=float,
    ).reshape(-1, 2)
    at = np.log(at)
    if len(at) < MIN_TRIALS or np.linalg.matrix_rank(at - at.mean(0), tol=1e-6) < 2:
        return None
    # Of trials at one point the mean; a browser never ends to draw levels between equal ones.
    at, place = np.unique(at, axis=0, return_inverse=True)
    scores = np.bincount(place, [row.scores[metric] for row in rows]) / np.bincount(place)
    if math.isclose(scores.min(), scores.max(), rel_tol=1e-9):
        return None
    xs, ys = (np.linspace(at[:, i].min(), at[:, i].max(), _CELLS) for i in range(2))
    grid = np.stack(np.meshgrid(xs, ys), -1)
    values = griddata(at, scores, grid, rescale=True)
    edge = [_BEYOND if noise is None else noise for noise in boundary.noises]
    least = np.interp(ys, np.log(boundary.counts), edge)
    values[np.exp(grid[..., 0]) < least[:, None]] = np.nan
    return {
        "type": "contour",
        "x": np.exp(xs).tolist(),
        "y": np.exp(ys).tolist(),
        "z": [[None if math.isnan(z) else z for z in line] for line in values.tolist()],
        "colorscale": [[0, "--low"], [1, "--high"]],
        "reversescale": DIRECTIONS[metric] == "minimize",
        "contours": {"showlabels": True, "labelfont": {"size": 12, "color": "--ink"}},
        "colorbar": {"title": {"text": metric, "side": "right"}, "thickness": 12},
        "line": {"width": 0.7, "color": "--soft"},
        "hoverinfo": "skip",
    }
