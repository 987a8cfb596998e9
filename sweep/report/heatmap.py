"""Annotated heat maps of a grid of two keys: the sweep's own, and a published one beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import spearmanr

from core.config import Config, flatten, load, nested
from core.config.metrics import DIRECTIONS
from core.errors import InfeasibleError
from core.io.terminal import ProgressLine
from core.privacy.plan.plan import make_plan
from sweep.config.grid import CANNOT_BE_PAID, NOISE_FACTOR, two_keys
from sweep.config.sweep import SweepConfig
from sweep.report.figures import LABELS, Figure
from sweep.report.tables import Table
from sweep.results.table import Row

MIN_COMMON = 4
"""Cells below which a rank correlation says nothing."""
_UNPAID, _UNTRIED, _UNPUBLISHED = "cannot be paid", "not tried", "not published"
_SYMBOLS = {_UNPAID: "x-thin", _UNPUBLISHED: "line-ew"}
"""Marks of cells without a figure; all others get a ring."""


@dataclass(frozen=True)
class HeatMap:
    """Figures over two keys.

    Attributes:
        id: of the figure on the page.
        keys: dotted key of the rows, and of the columns.
        values: of both keys.
        cells: row by row, a figure or why there is none.
    """

    id: str
    title: str
    metric: str
    keys: tuple[str, str]
    values: tuple[Sequence[Any], Sequence[Any]]
    cells: list[list[float | str]]

    @property
    def figure(self) -> Figure:
        """The map with its figures in the cells; its colours span its own figures alone."""
        (row, column), (rows, columns) = self.keys, self.values
        places = [
            (str(x), str(y), self.cells[j][i])
            for j, y in enumerate(rows)
            for i, x in enumerate(columns)
        ]
        data: list[dict[str, Any]] = [
            {
                "type": "heatmap",
                "x": [str(value) for value in columns],
                "y": [str(value) for value in rows],
                "z": [[None if isinstance(z, str) else z for z in line] for line in self.cells],
                "colorscale": [[0, "--low"], [1, "--high"]],
                "reversescale": DIRECTIONS.get(self.metric, "minimize") == "minimize",
                "showscale": False,
                "xgap": 2,
                "ygap": 2,
                "hoverinfo": "skip",
            },
            {
                "type": "scatter",
                "mode": "text",
                "x": [x for x, _, z in places if not isinstance(z, str)],
                "y": [y for _, y, z in places if not isinstance(z, str)],
                "text": [_written(z) for *_, z in places if not isinstance(z, str)],
                "textfont": {"color": "--ink"},
                "showlegend": False,
                "hoverinfo": "skip",
            },
        ]
        for reason in dict.fromkeys(z for *_, z in places if isinstance(z, str)):
            symbol = _SYMBOLS.get(reason, "circle-open")
            line = {"width": 2, "color": "--soft"}
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": reason,
                    "x": [x for x, _, z in places if z == reason],
                    "y": [y for _, y, z in places if z == reason],
                    "marker": {"symbol": symbol, "size": 10, "color": "--soft", "line": line},
                    "showlegend": True,
                    "hoverinfo": "skip",
                }
            )
        axis = {"type": "category", "showgrid": False}
        return Figure(
            id=self.id,
            title=f"{self.title}: {self.metric}",
            alt=f"{self.metric} over {row} (rows) and {column} (columns); the table has the same.",
            data=data,
            layout={
                "xaxis": {**axis, "title": {"text": _label(column)}},
                "yaxis": {**axis, "title": {"text": _label(row)}, "autorange": "reversed"},
            },
            height=130 + 48 * len(rows),
        )

    @property
    def table(self) -> Table:
        """The same in words and figures."""
        row, column = map(_label, self.keys)
        return Table(
            f"{self.title}: {self.metric}, {row} (down) by {column} (across)",
            [row, *(str(value) for value in self.values[1])],
            [
                [str(value), *(z if isinstance(z, str) else _written(z) for z in line)]
                for value, line in zip(self.values[0], self.cells, strict=True)
            ],
        )


def heat_maps(
    sweep: SweepConfig, rows: Sequence[Row], pruned: Sequence[dict[str, Any]]
) -> list[HeatMap]:
    """What there is to draw of a grid: own scores, own noise factors, what was published.

    Takes some seconds where factors are to be solved; reads no data.

    Args:
        rows: all trials of the sweep.
        pruned: points that were never trained.
    """
    published, keys = sweep.published, two_keys(sweep.choices)
    if keys is None:
        return []
    keys = (published.rows, published.columns) if published is not None else keys
    values = sweep.choices[keys[0]] or (), sweep.choices[keys[1]] or ()

    def filled(cell: Callable[[dict[str, Any]], float | str]) -> list[list[float | str]]:
        return [[cell(dict(zip(keys, (y, x), strict=True))) for x in values[1]] for y in values[0]]

    maps: list[HeatMap] = []
    metric = sweep.objective.metric
    if any(metric in row.scores for row in rows):
        cells = filled(lambda point: _score(metric, point, rows, pruned))
        maps.append(HeatMap("grid-own", "this sweep", metric, keys, values, cells))
    if published is None:
        return maps
    if published.metric == NOISE_FACTOR:
        line = ProgressLine()
        line.show("solving the DP-SGD noise of the grid")
        cells = filled(lambda point: _noise_factor(sweep.trial_config(point)))
        maps.append(HeatMap("grid-factor", "this sweep", NOISE_FACTOR, keys, values, cells))
    words = {None: _UNPUBLISHED, CANNOT_BE_PAID: _UNPAID}
    cells: list[list[float | str]] = [
        [words[z] if z is None or isinstance(z, str) else z for z in line]
        for line in published.lines(sweep.choices)
    ]
    title = published.title
    maps.append(HeatMap("grid-published", title, published.metric, keys, values, cells))
    return maps


def agreement(maps: Sequence[HeatMap]) -> str:
    """Spearman's rank correlation with the published grid, or why there is none; empty: no pair."""
    published = next((each for each in maps if each.id == "grid-published"), None)
    others = [each for each in maps if each is not published]
    if published is None or not others:
        return ""
    own = others[-1]  # Noise factors, where those were published.
    pairs = [
        (a, b)
        for mine, theirs in zip(own.cells, published.cells, strict=True)
        for a, b in zip(mine, theirs, strict=True)
        if not isinstance(a, str) and not isinstance(b, str)
    ]
    between = f"between {own.metric} of this sweep and {published.metric} as published"
    if len(pairs) < MIN_COMMON:
        return (
            f"No rank correlation {between}: they have {len(pairs)} cells in common, and fewer "
            f"than {MIN_COMMON} say nothing."
        )
    mine, theirs = zip(*pairs, strict=True)
    if len(set(mine)) == 1 or len(set(theirs)) == 1:
        return f"No rank correlation {between}: one of them is the same in all common cells."
    rho, _ = spearmanr(mine, theirs)
    return f"Spearman's rank correlation {between}, over {len(pairs)} common cells: {rho:.2f}."


def _score(
    metric: str,
    point: dict[str, Any],
    rows: Sequence[Row],
    pruned: Sequence[dict[str, Any]],
) -> float | str:
    """The trial's score; without one its state, or why there is no trial."""
    for row in rows:
        values = flatten(row.config)
        if all(values[key] == value for key, value in point.items()):
            return row.scores.get(metric, row.state)
    return _UNPAID if point in pruned else _UNTRIED


def _noise_factor(config: Config) -> float | str:
    """DP-SGD's noise multiplier over that of the same DP-SGD steps without an easy stage."""
    if config.trains_nothing:
        return "-"
    alone = {"method": "dpdm", "training.num_steps": config.private_steps}
    try:
        return (
            make_plan(config).noise_multiplier
            / make_plan(load(nested(config), alone)).noise_multiplier
        )
    except InfeasibleError:
        return _UNPAID


def _label(key: str) -> str:
    return LABELS.get(key, key)


def _written(value: float) -> str:
    return f"{value:.4g}"
