"""Page of the report: its content, and the template that it fills."""

import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from core.config import nested, yaml_subset
from core.errors import UserError
from core.io.files import to_json
from core.io.terminal import counted
from core.privacy.accounting.rounding import upward
from core.privacy.ledger.card import three_epsilons
from core.record.folder import class_names
from sweep.config.scope import inside
from sweep.config.sweep import SweepConfig
from sweep.report.affordable_map import affordable_map
from sweep.report.curves import curves
from sweep.report.effects import (
    RESAMPLES,
    Importance,
    affordable,
    importance,
    told_of_importance,
)
from sweep.report.figures import (
    Figure,
    budget_bars,
    easy_name,
    importance_bars,
    pareto,
    slices,
)
from sweep.report.heatmap import agreement, heat_maps
from sweep.report.pictures import CLASSES, Picture, picture
from sweep.report.tables import all_tables
from sweep.results.table import (
    Row,
    best,
    claimed_row,
    easy_count,
    load_rows,
    planned_epsilon,
    scored_rows,
    shown_metrics,
    sweep_card,
    sweep_epsilon,
    told_of_noise,
)
from sweep.search.study import pruned_points
from sweep.tracking.charts import CENTRAL_IMAGES, FREQUENCY

GALLERY_BYTES = 2_000_000
"""Pictures of the gallery stay below, so that the whole file can be mailed."""
_LARGE, _SMALL = 580, 290


def write_report(sweep: SweepConfig, out: Path) -> None:
    """Writes the report of a sweep, whatever state it is in.

    Privacy: the page holds scores and losses of real data, which are not private, and says so.
    """
    rows = load_rows(sweep)
    winner = best(sweep, rows)
    finished = scored_rows(sweep, rows)
    pruned = pruned_points(sweep)
    metrics = shown_metrics(sweep, rows)
    found = importance(sweep, rows)
    if isinstance(found, str):
        told, found = [found], dict[str, Importance]()
    else:
        told = told_of_importance(found, sweep.objective.metric)
    figures = _figures(sweep, rows, finished, winner, pruned, found)
    maps = heat_maps(sweep, rows, pruned)
    figures += [each.figure for each in maps]
    card, total, no_card = _card(sweep, rows, winner)
    epsilons = three_epsilons({**card, "epsilon_computed": total}) if card else []
    content = {
        "sweep": sweep,
        "inside": inside([sweep]),
        "upward": upward,
        "counted": counted,
        "easy_count": easy_count,
        "easy_name": easy_name,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "rows": rows,
        "winner": winner,
        "finished": finished,
        "metrics": metrics,
        "card": card,
        "no_card": no_card,
        "epsilons": epsilons,
        "num_pruned": len(pruned),
        "figures": {figure.id: figure for figure in figures},
        "slices": [figure for figure in figures if figure.id.startswith("slice-")],
        "maps": maps,
        "agreement": agreement(maps),
        "told_of_noise": told_of_noise(sweep, rows),
        "told_of_importance": told,
        "resamples": RESAMPLES,
        "tables": all_tables(sweep, rows, winner, metrics, pruned, total),
        "pictures": _winner_pictures(winner),
        "classes": CLASSES,
        "class_names": _class_names(winner),
        "gallery": _gallery(sweep, [row for row in rows if row.state == "finished"]),
        "configuration": yaml_subset.dump(nested(winner.config)) if winner else "",
        "figure_data": to_json(
            [{"id": each.id, "data": each.data, "layout": each.layout} for each in figures]
        ).replace("</", "<\\/"),
        "plotly": get_plotlyjs(),
    }
    files = resources.files("sweep.report")
    parts = {name: (files / f"page.{name}").read_text() for name in ("html", "css", "js")}
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(parts["html"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page.render(content, css=parts["css"], js=parts["js"]))


def _figures(
    sweep: SweepConfig,
    rows: Sequence[Row],
    finished: Sequence[Row],
    winner: Row | None,
    pruned: Sequence[dict[str, Any]],
    found: Mapping[str, Importance],
) -> list[Figure]:
    figures = [budget_bars(rows, winner)] if rows else []
    if (lines := curves(rows, winner)) is not None:
        figures.append(lines)
    if winner is None:
        return figures
    fid = next(name for name in winner.scores if name.startswith("fid"))
    figures += [pareto(finished, winner, fid), *slices(sweep, finished, winner)]
    if found:
        figures.append(importance_bars(found))
    easy = [row for row in finished if not row.config.is_plain]
    around = best(sweep, easy)
    if around is not None and (boundary := affordable(sweep, around.config)) is not None:
        figures.append(affordable_map(sweep, easy, winner, boundary, pruned))
    return figures


def _card(
    sweep: SweepConfig, rows: list[Row], winner: Row | None
) -> tuple[dict[str, Any] | None, float, str]:
    """Privacy card and epsilon of the sweep; or no card, and what can be said without a ledger."""
    total = planned_epsilon(rows)
    if winner is None:
        text = f"What ran so far spends epsilon {upward(total)}, by the plans of its trials."
        return None, total, text
    released, none_yet = claimed_row(sweep, rows)
    if released is None:
        return None, total, f"{none_yet[0].upper()}{none_yet[1:]}."
    try:
        return sweep_card(sweep, rows, released), sweep_epsilon(sweep, rows), ""
    except UserError as error:
        text = (
            f"The ledger could not be read: {error}. By the trials' own plans, the best one alone "
            f"spends epsilon {upward(winner.plan.epsilon)} and all together {upward(total)}."
        )
        return None, total, text


def _winner_pictures(winner: Row | None) -> dict[str, Picture | None]:
    if winner is None:
        return {}
    folder = winner.folder
    grids = {CENTRAL_IMAGES: folder.central_grid, FREQUENCY: folder.frequency_grid}
    grids["synthetic"] = folder.grid
    found = {name: picture(path, winner.config, _LARGE) for name, path in grids.items()}
    if found[FREQUENCY] is None:  # A stage of one method.
        del found[FREQUENCY]
    return found


def _class_names(winner: Row | None) -> list[str]:
    """Of the rows of a grid that are shown."""
    if winner is None:
        return []
    return class_names(winner.run_dir, winner.config.dataset.num_classes)[:CLASSES]


def _gallery(sweep: SweepConfig, finished: Sequence[Row]) -> list[tuple[Row, Picture | None]]:
    """Finished trials, the best first, with their pictures as long as there is room."""
    metric = sweep.objective.metric
    ordered = sorted(
        finished,
        key=lambda row: row.scores[metric],
        reverse=sweep.objective.direction == "maximize",
    )
    used, cards = 0, []
    for row in ordered:
        image = picture(row.folder.grid, row.config, _SMALL)
        used += len(image.uri) if image else 0
        cards.append((row, image if used <= GALLERY_BYTES else None))
    return cards
