"""Training curves of a sweep's trials, read from their metrics.jsonl."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from sweep.report.figures import Figure
from sweep.results.table import Row

_STAGES = {"warm_up": "warm-up", "private_training": "DP-SGD"}
_MAX_POINTS = 120
"""Points of one trial's curve; more would only make the file larger."""


def curves(rows: Sequence[Row], winner: Row | None) -> Figure | None:
    """Loss against the step; None if nothing was logged."""
    traces: list[dict[str, Any]] = []
    named: set[str] = set()
    for row in sorted(rows, key=lambda row: row is winner):  # The best one is drawn on top.
        points = [line for line in row.folder.reports() if "loss" in line]
        points = points[:: len(points) // _MAX_POINTS + 1]
        best = row is winner
        for stage, part in groupby(points, key=lambda line: line["stage"]):
            name = f"{'best trial' if best else 'other trials'}, {_STAGES[stage]}"
            lines = list(part)
            losses = [line["loss"] for line in lines]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": name,
                    "legendgroup": name,
                    "showlegend": name not in named,
                    "x": [line["step"] for line in lines],
                    # A loss that is not finite is kept as a text, and drawn as a gap.
                    "y": [None if isinstance(each, str) else each for each in losses],
                    "line": {
                        "dash": "dot" if stage == "warm_up" else "solid",
                        "width": 3 if best else 1.3,
                        "color": "--best" if best else "--trial",
                    },
                    "opacity": 1 if best else 0.65,
                    "hovertemplate": f"{row.trial}, step %{{x}}: loss %{{y:.4g}}<extra></extra>",
                }
            )
            named.add(name)
    if not traces:
        return None
    return Figure(
        id="curves",
        title="Loss against step",
        alt=f"Training loss of {len(rows)} trials; dotted during warm-up on central images, solid "
        "during DP-SGD.",
        data=traces,
        layout={
            "xaxis": {"title": {"text": "step"}},
            "yaxis": {"title": {"text": "loss (not private)"}},
        },
    )
