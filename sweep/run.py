# PYTHON_ARGCOMPLETE_OK
"""Command line of a sweep: `python sweep/run.py [--config FILE | --data FOLDER] [key=value ...]`.

The same command starts a sweep, continues an interrupted one, or shows the results of a complete
one. `ray job submit --runtime-env clusters/runtime_env.yaml --working-dir . -- python
sweep/run.py ...` runs it on a cluster.
"""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

# As a script this folder would come first on the path and hide packages of the same names.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from core.__main__ import add_folder_options, add_verbosity
from core.config import Config, parse_overrides
from core.config.keys import known_keys
from core.errors import ConfigError, UserError
from core.io.completion import answer_shell, completed, yaml_files
from sweep.config.address import storage_folder
from sweep.config.sweep import SweepConfig, load_sweep

QUICKSTART = Path(__file__).resolve().parent / "configs" / "quickstart.yaml"
_OF_RUN = ("objective", "search_space", "final")
"""Keys of a sweep that depend on its run."""
LIMITS = {
    "max_hours": "device hours (GPUs, or CPU cores without any)",
    "max_gpu_hours": "GPU hours",
    "max_cost": "USD, by cloud=aws|gcp and clusters/prices.yaml",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    Returns:
        0 when all trials have finished, 1 when some failed or none could be found, 2 for a user's
        error, 3 when a limit was reached, 130 when interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python sweep/run.py",
        description=__doc__,
        epilog="example: python sweep/run.py --data photos --epsilon 10 --publish-counts",
    )
    which = parser.add_mutually_exclusive_group()
    text = "YAML file, as in sweep/configs; the quickstart's if not given"
    yaml_files(which.add_argument("--config", default=QUICKSTART, type=Path, help=text))
    text = "folder of images of your own: writes a configuration as core init does, and runs it"
    which.add_argument("--data", type=Path, metavar="FOLDER", help=text)
    add_folder_options(parser)
    parser.add_argument("--name", help="name of the sweep; the same name continues it")
    parser.add_argument(
        "--plan", action="store_true", help="print what would run; reads no data, trains nothing"
    )
    parser.add_argument(
        "--probe", action="store_true", help="with --plan: measure a few steps on random images"
    )
    for name, unit in LIMITS.items():
        text = f"most {unit} that the sweep may use, earlier starts included; then it stops"
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=text)
    parser.add_argument(
        "--doctor", action="store_true", help="check cluster, storage, MLflow, data; trains nothing"
    )
    text = "key of the sweep or of the run"
    keys = parser.add_argument("overrides", nargs="*", metavar="key=value", help=text)
    completed(keys, lambda: [f"{key}=" for key in (*known_keys(SweepConfig), *known_keys(Config))])
    add_verbosity(parser)
    answer_shell(parser)
    options = parser.parse_intermixed_args(arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        return _run(options)
    except (UserError, OSError) as error:  # OSError: names the path.
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def _configuration(options: argparse.Namespace, overrides: dict[str, Any]) -> Path:
    """The sweep's file: the one that is named, or that of a folder, written unless it is there."""
    if options.data is None:
        of_data = (options.epsilon, options.minutes, options.gpu_hours)
        if options.publish_counts or of_data != (None, None, None):
            raise ConfigError(
                "--epsilon, --minutes, --gpu-hours and --publish-counts need --data FOLDER: name "
                "the images"
            )
        return options.config
    from core.commands.init import name_of, require_of, write_configuration

    name = name_of(options.data, options.epsilon)
    known, of_run, alone = known_keys(Config), dict[str, Any](), dict[str, Any]()
    for key, value in overrides.items():
        if key in known:
            of_run[key] = value
        elif not key.startswith(_OF_RUN):
            alone[key] = value
    load_sweep(QUICKSTART, alone)  # What is refused here costs no reading of images.
    out = storage_folder(overrides.get("storage_path", "runs")) / "init" / f"{name}.yaml"
    sweep = out.with_name(f"{name}_sweep.yaml")
    if sweep.exists():
        require_of(options.data, out)
        print(f"goes on with {sweep}; remove it and {out} to choose anew")
        return sweep
    return write_configuration(options, options.data, of_run, out)


def _run(options: argparse.Namespace) -> int:
    overrides = parse_overrides(options.overrides)
    if options.name is not None:
        overrides["name"] = options.name
    limits = {name: getattr(options, name) for name in LIMITS}
    overrides |= {name: value for name, value in limits.items() if value is not None}
    if options.probe and not options.plan:
        raise ConfigError("--probe measures for --plan: give both")
    sweep = load_sweep(_configuration(options, overrides), overrides)
    if options.plan:
        from sweep.search.feasible import print_plan

        print_plan(sweep, options.probe)
        return 0
    if options.doctor:
        from sweep.driver.doctor import print_checks

        return 0 if print_checks(sweep) else 1
    from sweep.driver.launch import run_sweep
    from sweep.results.table import print_results
    from sweep.search.study import pruned_points
    from sweep.tracking.client import how_to_compare

    outcome = run_sweep(sweep, options.verbosity)
    os.chdir(sweep.folder)  # That of a submitted job vanishes while it is being stopped.
    ui = how_to_compare(outcome.uri, sweep.experiment, sweep.name)
    print_results(sweep, outcome.rows, len(pruned_points(sweep)), ui)  # Of earlier starts, too.
    if outcome.stopped == "interrupted":
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    if outcome.limited:
        print(f"stopped: {outcome.stopped}", file=sys.stderr)
        return 3
    if outcome.stopped:
        print(f"the search gave up: {outcome.stopped}", file=sys.stderr)
        return 1
    ended = all(row.state in ("finished", "stopped") for row in outcome.rows)
    return 0 if outcome.complete and ended else 1


if __name__ == "__main__":
    # A script that starts this in its background has it ignore the signal that stops a sweep.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
