"""Plots of the report as plain Plotly figures; colours are names of the page's CSS variables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.config import flatten
from core.config.keys import CLUSTERS, COUNT, NOISE
from core.privacy.accounting.rounding import upward
from core.privacy.plan.releases import RELEASES
from sweep.config.sweep import SweepConfig
from sweep.report.effects import Importance
from sweep.results.table import Row, easy_count

LABELS = {
    COUNT: "count",
    CLUSTERS: "count",
    NOISE: "noise",
    "stage_split": "stage split",
}
_EASY = (COUNT, CLUSTERS, NOISE)
"""What nothing uses without an easy stage."""
_BEST = {"symbol": "star", "size": 17, "color": "--best", "line": {"width": 1, "color": "--paper"}}
_TRIAL = {"symbol": "circle", "size": 10, "color": "--trial"}
_BASELINE = {"symbol": "square-open", "size": 11, "color": "--trial", "line": {"width": 2}}


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        alt: what a person who cannot see it should know.
        height: in CSS pixels.
    """

    id: str
    title: str
    alt: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 380


def scatter(rows: Sequence[Row], winner: Row | None, x: Any, y: Any) -> list[dict[str, Any]]:
    """Points of trials, told apart by shape: the best one, plain DP-SGD, all others.

    Args:
        x, y: functions from a row to its coordinate.
    """
    kinds = (
        ("trial", _TRIAL, lambda row: row is not winner and row.config.warm_up_steps),
        (
            "trial without easy stage",
            _BASELINE,
            lambda row: row is not winner and not row.config.warm_up_steps,
        ),
        ("best trial", _BEST, lambda row: row is winner),  # Last, so on top of the others.
    )
    traces: list[dict[str, Any]] = []
    for name, marker, belongs in kinds:
        members = [row for row in rows if belongs(row)]
        if members:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "marker": marker,
                    "x": [x(row) for row in members],
                    "y": [y(row) for row in members],
                    "text": [describe(row) for row in members],
                    "hovertemplate": "%{text}<extra></extra>",
                }
            )
    return traces


def describe(row: Row) -> str:
    """A trial's point and scores, for a hover label."""
    config = row.config
    noise = config.central_images.noise_multiplier
    easy = f"count {easy_count(row.plan)}, noise {noise:.3g}, split {config.stage_split:.2f}"
    if config.trains_nothing:
        easy = f"{config.method} alone, noise {row.plan.noise_multiplier:.3g}"
    elif config.is_plain:
        easy = "no easy stage (plain DP-SGD)"
    scores = ", ".join(f"{name} {value:.4g}" for name, value in row.scores.items())
    return "<br>".join(filter(None, (f"<b>{row.trial}</b>", easy, scores)))


def easy_name(rows: Sequence[Row]) -> str:
    """What the easy stages of trials release."""
    plans = [row.plan for row in rows]
    names = [name for name in ("central", "moments") if any(getattr(p, name) for p in plans)]
    return " or ".join(RELEASES[name].title for name in names) or "central images"


def pareto_front(rows: Sequence[Row], fid: str) -> list[Row]:
    """Trials that no other beats in both accuracy and the Frechet distance `fid`."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.scores[fid], -row.scores["accuracy"])):
        if not front or row.scores["accuracy"] > front[-1].scores["accuracy"]:
            front.append(row)
    return front


def pareto(rows: Sequence[Row], winner: Row | None, fid: str) -> Figure:
    """Frechet distance against accuracy, with the front as a dashed line."""
    front = pareto_front(rows, fid)
    line = {
        "type": "scatter",
        "mode": "lines+text",
        "name": "Pareto front",
        "x": [row.scores[fid] for row in front],
        "y": [row.scores["accuracy"] for row in front],
        "text": [f"<br>{row.trial}" for row in front],  # Below the marker, not on it.
        "textposition": "bottom center",
        "cliponaxis": False,
        "line": {"dash": "dash", "color": "--soft", "width": 1.5},
        "hoverinfo": "skip",
    }
    points = scatter(rows, winner, lambda row: row.scores[fid], lambda row: row.scores["accuracy"])
    return Figure(
        id="pareto",
        title=f"Accuracy against {fid}",
        alt=f"{len(rows)} finished trials by {fid} and accuracy; on the Pareto front: "
        f"{', '.join(row.trial for row in front)}.",
        data=[line, *points],
        layout={
            "xaxis": {"title": {"text": f"{fid} (lower is better)"}},
            "yaxis": {"title": {"text": "accuracy (higher is better)"}},
        },
        height=430,
    )


def slices(sweep: SweepConfig, rows: Sequence[Row], winner: Row | None) -> list[Figure]:
    """The objective over each searched parameter."""
    metric = sweep.objective.metric
    figures: list[Figure] = []
    for number, (key, dimension) in enumerate(sweep.search_space.items()):
        shown = [row for row in rows if not row.config.is_plain or key not in _EASY]
        values = {row.trial: flatten(row.config)[key] for row in shown}
        kind = "category" if dimension.choices is not None else "log" if dimension.log else "linear"
        title = LABELS.get(key, key)
        order = {"categoryarray": [*dimension.choices]} if dimension.choices else {}
        figures.append(
            Figure(
                id=f"slice-{number}",
                title=f"{metric} over {title}",
                alt=f"{metric} of {len(shown)} trials over {key}; "
                "the values are in the table of all trials.",
                data=scatter(
                    shown,
                    winner,
                    lambda row, values=values: values[row.trial],
                    lambda row: row.scores[metric],
                ),
                layout={
                    "xaxis": {"type": kind, "title": {"text": title}, **axis_ticks(kind), **order},
                    "yaxis": {"title": {"text": metric}},
                    "showlegend": False,
                },
                height=300,
            )
        )
    return figures


def axis_ticks(kind: str) -> dict[str, Any]:
    """On a logarithmic axis 1, 2, 5, 10 are numbers that people read."""
    return {"dtick": "D2", "tickformat": "~g"} if kind == "log" else {}


def importance_bars(found: Mapping[str, Importance]) -> Figure:
    """Share of the objective's variance that each parameter explains; hollow where chance may."""
    keys = [*found][::-1]
    text = {
        key: f"{each.share:.0%} ({100 * each.low:+.0f} to {100 * each.high:+.0f} points beyond "
        "chance)"
        for key, each in found.items()
    }
    return Figure(
        id="importance",
        title="Share of the variance that each parameter explains; hollow: not told from chance",
        alt="; ".join(f"{key} {told}" for key, told in text.items()),
        data=[
            {
                "type": "bar",
                "orientation": "h",
                "x": [found[key].share for key in keys],
                "y": [LABELS.get(key, key.replace(".", ".<br>")) for key in keys],
                "text": [text[key] for key in keys],
                "textposition": "outside",
                "cliponaxis": False,
                "marker": {
                    "color": ["--trial" if found[key].is_effect else "--paper" for key in keys],
                    "line": {"color": "--trial", "width": 1.5},
                },
                "hoverinfo": "skip",
            }
        ],
        layout={
            "xaxis": {"tickformat": ".0%", "rangemode": "tozero", "range": [0, 1.6]},
            "yaxis": {"automargin": True},
        },
        height=80 + 42 * len(keys),
    )


def budget_bars(rows: Sequence[Row], winner: Row | None) -> Figure:
    """What each trial's two stages take of the target."""
    target = max(row.plan.target_epsilon for row in rows)
    ordered = list(reversed(rows))
    names = [row.trial + (" *" if row is winner else "") for row in ordered]

    def bar(name: str, values: list[float], marker: dict[str, Any]) -> dict[str, Any]:
        return {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "x": values,
            "y": names,
            "marker": marker,
            "text": [upward(value, 3) for value in values],
            "textposition": "none",  # But on hovering.
            "hovertemplate": f"%{{y}}: {name} %{{text}}<extra></extra>",
        }

    central = [row.plan.epsilon_central for row in ordered]
    rest = [row.plan.epsilon - row.plan.epsilon_central for row in ordered]
    hatched = {"shape": "/", "fgcolor": "--paper", "size": 6, "fillmode": "overlay"}
    return Figure(
        id="budget",
        title="Epsilon of each trial by stage",
        alt=f"Of the target epsilon {upward(target)}, {easy_name(rows)} take between "
        f"{upward(min(central), 3)} and {upward(max(central), 3)}; what follows takes the rest.",
        data=[
            bar(f"{easy_name(rows)} alone", central, {"color": "--best"}),
            bar("added by what follows", rest, {"color": "--trial", "pattern": hatched}),
        ],
        layout={
            "barmode": "stack",
            "xaxis": {"title": {"text": "epsilon"}, "range": [0, target * 1.06]},
            "yaxis": {"type": "category", "automargin": True, "tickmode": "linear"},
            "shapes": [
                {
                    "type": "line",
                    "x0": target,
                    "x1": target,
                    "yref": "paper",
                    "y0": 0,
                    "y1": 1,
                    "line": {"dash": "dash", "color": "--ink", "width": 1.5},
                }
            ],
            "bargap": 0.35,
            "legend": {"traceorder": "normal"},
        },
        height=130 + 24 * len(rows),
    )
