"""Tables of the report, as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.io.files import read_json
from core.privacy.accounting.rounding import figure, upward
from core.publish.class_table import COLUMNS, class_rows
from sweep.config.sweep import SweepConfig
from sweep.report.figures import easy_name, pareto_front
from sweep.results.table import Row, results_table, winners
from sweep.search.feasible import describe_dimension

_MAX_PRUNED = 30


@dataclass(frozen=True)
class Table:
    """A table; the first column names the line, and `words` stand left, figures right."""

    caption: str
    columns: list[str]
    lines: list[list[str]]
    words: bool = False


def all_tables(
    sweep: SweepConfig,
    rows: list[Row],
    winner: Row | None,
    metrics: list[str],
    pruned: Sequence[dict[str, Any]],
    epsilon: float,
) -> dict[str, Table]:
    """Every table of the page by its name there; without `front` as long as nothing finished,
    and without `classes` as long as the best trial was not inspected."""
    trials = results_table(sweep, rows, winners(sweep, rows), metrics, epsilon)
    star = "the best" if len(sweep.objectives) == 1 else "the Pareto front"
    cells = zip(*(column.cells for column in trials.columns), strict=True)
    tables = {
        "trials": Table(
            f"All trials in the order in which they began; * marks {star}. Scores are not private.",
            [str(column.header) for column in trials.columns],
            [[str(cell) for cell in line] for line in cells],
        ),
        "environment": Table(
            "Where the trials ran", ["what", "value"], _environment(rows), words=True
        ),
        "sweep": Table("The search", ["what", "value"], _settings(sweep), words=True),
        "failures": _failures(rows),
        "budget": _budget(rows),
        "pruned": Table(
            f"Points that were never trained ({len(pruned)})",
            list(sweep.search_space),
            [
                [figure(key, point.get(key)) for key in sweep.search_space]
                for point in pruned[:_MAX_PRUNED]
            ],
        ),
    }
    if winner is not None:
        names = ["accuracy", next(name for name in winner.scores if name.startswith("fid"))]
        finished = [row for row in rows if row.state == "finished"]
        found = winner.folder.inspection
        if found.exists() and (classes := read_json(found).get("classes")):  # Absent in old ones.
            caption = "Classes of the best trial on real test images, the worst first; not private."
            tables["classes"] = Table(caption, [*COLUMNS], class_rows(classes), words=True)
        tables["front"] = Table(
            "The Pareto front; scores are not private.",
            ["trial", *names],
            [
                [row.trial, *(figure(name, row.scores[name]) for name in names)]
                for row in pareto_front(finished, names[1])
            ],
        )
    return tables


def _failures(rows: Sequence[Row]) -> Table:
    lines = [
        [row.trial, row.state, row.error or "interrupted, or still running"]
        for row in rows
        if row.state != "finished"
    ]
    return Table("Trials without a result", ["trial", "state", "reason"], lines, words=True)


def _budget(rows: Sequence[Row]) -> Table:
    lines = [
        [
            row.trial,
            upward(row.plan.epsilon_central),
            upward(row.plan.epsilon - row.plan.epsilon_central),
            upward(row.plan.epsilon),
        ]
        for row in rows
    ]
    columns = ["trial", f"{easy_name(rows)} alone", "added by what follows", "together"]
    return Table("Epsilon of each trial by stage", columns, lines)


def _settings(sweep: SweepConfig) -> list[list[str]]:
    space = [[key, describe_dimension(each)] for key, each in sweep.search_space.items()]
    objectives = [f"{each.direction} {each.metric}" for each in sweep.objectives]
    objective = f"{', '.join(objectives)} (not private)"
    return [
        *space,
        ["objective", objective],
        ["sampler", sweep.sampler],
        ["scheduler", sweep.scheduler],
        ["num_trials", str(sweep.num_trials)],
        ["replicates", str(sweep.replicates)],
        ["workers_per_trial", str(sweep.workers_per_trial)],
        ["search_seed", str(sweep.search_seed)],
        *[[key, str(value)] for key, value in sweep.fixed.items()],
    ]


def _environment(rows: Sequence[Row]) -> list[list[str]]:
    """Every fact about the machines, with all values that occur."""
    values: dict[str, dict[str, None]] = {}
    for row in rows:
        path = row.folder.environment
        facts = read_json(path) if path.exists() else {}
        for name, value in facts.items():
            values.setdefault(name, {})[str(value)] = None
    return [[name, ", ".join(found)] for name, found in values.items()]
