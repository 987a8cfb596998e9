# PYTHON_ARGCOMPLETE_OK
"""Commands that look at sweeps, stop and export them; `python sweep/run.py` starts them.

Scores that these commands show are computed from real images and are not private.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from core.config import nested, yaml_subset
from core.errors import ConfigError, LedgerError, UserError
from core.io.completion import answer_shell, completed, yaml_files
from core.io.files import to_json
from core.privacy.accounting.rounding import figure, upward
from sweep.config.address import storage_folder
from sweep.config.scope import inside
from sweep.config.sweep import SweepConfig, load_sweep
from sweep.results.driver import running_driver, stop_driver
from sweep.results.export import differences, export, record, records
from sweep.results.find import find_trial, open_sweep, sweep_names
from sweep.results.table import (
    Row,
    best,
    load_rows,
    num_left,
    num_planned,
    print_results,
    print_whole,
    sweep_epsilon,
    winners,
)
from sweep.search.study import pruned_points

EXAMPLES = {
    "ls": "--storage runs",
    "show": "quickstart",
    "best": "quickstart --out best.yaml",
    "stop": "quickstart",
    "export": "quickstart --out trials.csv",
    "report": "--name quickstart",
    "diff": "quickstart/best quickstart/6fa4",
}
"""How each command may be called; its help shows it."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 for a user's error."""
    parser = _parser()
    answer_shell(parser)
    options = parser.parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        options.command(options)
    except (UserError, OSError) as error:  # OSError: names the path.
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sweep", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Any, text: str, as_json: bool) -> argparse.ArgumentParser:
        example = f"example: python -m sweep {name} {EXAMPLES[name]}"
        command = commands.add_parser(name, help=text, description=text, epilog=example)
        command.set_defaults(command=function)
        text = "folder of sweeps, or the address that storage_path was; default: runs"
        command.add_argument("--storage", type=storage_folder, default=Path("runs"), help=text)
        if as_json:
            command.add_argument("--json", action="store_true", help="for scripts")
        return command

    add("ls", _list, "every sweep of a storage folder", as_json=True)
    show = add("show", _show, "the trials of a sweep and what they cost", as_json=True)
    winner = add("best", _best, "write the configuration of the best trial", as_json=True)
    stop = add("stop", _stop, "ask the running driver of a sweep to stop", as_json=False)
    dump = add("export", _export, "the trials as a file for other programs", as_json=False)
    report = add("report", _report, "one HTML file about a sweep", as_json=False)
    text = "name of the sweep"
    names = [command.add_argument("name", help=text) for command in (show, winner, stop, dump)]
    which = report.add_mutually_exclusive_group(required=True)
    names.append(which.add_argument("--name", help=text))
    for each in names:
        completed(each, lambda: sweep_names(Path("runs")))
    text = "a sweep's file, whether it was started or not: what its privacy plan alone can say"
    yaml_files(which.add_argument("--config", help=text))
    winner.add_argument("--by", metavar="METRIC", help="of several objectives the one that counts")
    winner.add_argument("--out", type=Path, help="file; default: best.yaml in the sweep's folder")
    dump.add_argument("--out", type=Path, required=True, help="file.csv, .json or .parquet")
    report.add_argument("--out", type=Path, help="file; default: report.html in the sweep's folder")
    diff = add("diff", _diff, "what differs between two trials", as_json=True)
    for name in ("first", "second"):
        diff.add_argument(name, help="[SWEEP/]TRIAL: 'best' or the first digits of its id")
    return parser


def _list(options: argparse.Namespace) -> None:
    opened = [open_sweep(options.storage, name) for name in sweep_names(options.storage)]
    sweeps = [_overview(sweep) for sweep in opened]
    if not sweeps:
        raise ConfigError(f"'{options.storage}' holds no sweep: name its folder with --storage")
    _warn(options, *opened)
    if options.json:
        _print_json(sweeps)
    else:
        _print_table([_short(each) for each in sweeps])


def _overview(sweep: SweepConfig) -> dict[str, Any]:
    rows = load_rows(sweep)
    winner, metric = best(sweep, rows), sweep.objective.metric
    front = [row.trial for row in winners(sweep, rows)]
    states = [row.state for row in rows]
    return {
        "sweep": sweep.name,
        "state": _state(sweep, rows),
        "num_trials": num_planned(sweep),
        "num_left": num_left(sweep, rows),
        "finished": states.count("finished"),
        "stopped": states.count("stopped"),
        "failed": states.count("failed"),
        "unfinished": states.count("unfinished"),
        "best_trial": winner.trial if winner else None,
        "best_trials": front,
        "objective": ", ".join(sweep.metrics),
        "best_score": winner.scores[metric] if winner else None,
        "epsilon_trial": max(row.plan.epsilon for row in rows) if winner else None,
        "epsilon_sweep": _recorded_epsilon(sweep, rows),
    }


def _state(sweep: SweepConfig, rows: Sequence[Row]) -> str:
    if running_driver(sweep.folder):
        return "running"
    complete = any(row.folder.selected.exists() for row in rows)
    return "complete" if complete else "incomplete"


def _recorded_epsilon(sweep: SweepConfig, rows: Sequence[Row]) -> float | None:
    """None where the ledger is gone: `show` says so, a list goes on."""
    try:
        return sweep_epsilon(sweep, rows)
    except LedgerError:
        return None


def _short(overview: Mapping[str, Any]) -> dict[str, Any]:
    """What of an overview fits in a line."""
    done, total = overview["finished"] + overview["stopped"], overview["num_trials"]
    spent, so_far = overview["epsilon_sweep"], " so far" if overview["num_left"] else ""
    return {
        "sweep": overview["sweep"],
        "state": overview["state"],
        "done": f"{done}/{total}" if total else done,
        "stopped": overview["stopped"],
        "failed": overview["failed"],
        "best trial": ", ".join(overview["best_trials"]) or None,
        "score": overview["best_score"],
        "objective": overview["objective"],
        "eps trial": overview["epsilon_trial"],
        "eps sweep": None if spent is None else upward(spent) + so_far,
    }


def _show(options: argparse.Namespace) -> None:
    sweep = open_sweep(options.storage, options.name)
    rows = load_rows(sweep)
    if options.json:
        total = sweep_epsilon(sweep, rows)
        _warn(options, sweep)
        left = num_left(sweep, rows)  # Above 0, the epsilon is that of what ran so far.
        of_all = {"epsilon_sweep": total, "num_left": left}
        _print_json([{**each, **of_all} for each in records(sweep, rows)])
        return
    from sweep.tracking.client import how_to_compare, tracking_uri

    uri = tracking_uri(Path(sweep.storage_path))
    ui = how_to_compare(uri, sweep.experiment, sweep.name)
    print_results(sweep, rows, len(pruned_points(sweep)), ui)


def _best(options: argparse.Namespace) -> None:
    sweep = open_sweep(options.storage, options.name)
    if options.by is not None and options.by not in sweep.metrics:
        raise ConfigError(f"--by={options.by} must be an objective: {', '.join(sweep.metrics)}")
    rows = load_rows(sweep)
    winner = best(sweep, rows, options.by)
    if winner is None:
        raise ConfigError(f"no trial of sweep '{sweep.name}' has finished: there is no best one")
    _warn(options, sweep)  # The best one so far of a selection is not the one that leaves.
    if sweep.further_objectives and options.by is None:
        front = [record(row) for row in winners(sweep, rows)]
        if options.json:
            _print_json(front)
            return
        _print_table([{k: row[k] for k in ("trial", *sweep.metrics, "epsilon")} for row in front])
        print(
            f"the Pareto front: choose the best by one with --by {' or --by '.join(sweep.metrics)}"
        )
        return
    path = options.out or sweep.folder / "best.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml_subset.dump(nested(winner.config)))
    if options.json:
        _print_json({**record(winner), "config": str(path)})
        return
    scores = {**winner.scores, "epsilon": winner.plan.epsilon, "seconds": winner.seconds}
    _print_table([{"trial": winner.trial, **scores}])
    print(f"configuration: {path}")
    print(f"train it again: python -m core run --config {path} (spends its epsilon once more)")


def _diff(options: argparse.Namespace) -> None:
    (one, first), (other, second) = (
        find_trial(options.storage, name) for name in (options.first, options.second)
    )
    _warn(options, one, other)
    found = differences(first, second)
    if options.json:
        _print_json({key: list(values) for key, values in found.items()})
    elif not found:
        print("nothing differs")
    else:
        columns = [f"1: {first.trial}", f"2: {second.trial}"]
        _print_table(
            [{"key": k, **dict(zip(columns, pair, strict=True))} for k, pair in found.items()],
            digits=7,
        )


def _stop(options: argparse.Namespace) -> None:
    driver = stop_driver(open_sweep(options.storage, options.name).folder)
    print(
        f"asked process {driver.pid} to stop; trials keep their checkpoints, and the command that "
        "started the sweep continues it"
    )


def _export(options: argparse.Namespace) -> None:
    sweep = open_sweep(options.storage, options.name)
    rows = load_rows(sweep)
    export(sweep, rows, options.out)
    print(inside([sweep]), end="")
    print(f"{len(rows)} trials: {options.out} (scores are not private)")


def _report(options: argparse.Namespace) -> None:
    from sweep.report import write_report

    if options.config:
        sweep = load_sweep(options.config, {"storage_path": str(options.storage)})
    else:
        sweep = open_sweep(options.storage, options.name)
    path = options.out or sweep.folder / "report.html"
    write_report(sweep, path)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB; holds scores, which are not private)")


def _warn(options: argparse.Namespace, *sweeps: SweepConfig) -> None:
    """Says what must stay inside: above a table, and beside JSON, which programs read."""
    print(inside(sweeps), end="", file=sys.stderr if options.json else sys.stdout)


def _print_json(content: Any) -> None:
    print(to_json(content, indent=2))


def _print_table(records: Sequence[Mapping[str, Any]], digits: int = 4) -> None:
    table = Table(box=box.SIMPLE)
    for name, value in records[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for each in records:
        # A line about one key has its name in its first cell.
        cells = ((each.get("key", name), value) for name, value in each.items())
        table.add_row(*("-" if v is None else figure(key, v, digits) for key, v in cells))
    print_whole(table)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Whoever reads, as `head`, may have enough.
    sys.exit(main())
