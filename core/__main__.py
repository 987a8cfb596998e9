"""Command line of one run and its folder, without Ray and MLflow: `python -m core`."""

import argparse
import importlib
import logging
import signal
import sys
from pathlib import Path

from core.errors import StoppedError, UserError


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, 2 for a user's error, 3 at a time limit, 130 for Ctrl-C.
    """
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if more:  # argparse takes key=value arguments on one side of the flags alone.
        if "overrides" not in options or any(argument.startswith("-") for argument in more):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        options.overrides += more
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        module, _, function = options.command.partition(":")
        getattr(importlib.import_module(module), function)(options)  # Some need torch, not all.
    except StoppedError as stop:
        print(stop, file=sys.stderr)
        return 3
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Adds `-q` and `-v`, which set `verbosity` to -1 and 1."""
    group = parser.add_mutually_exclusive_group()
    for flag, value, text in (("quiet", -1, "no progress"), ("verbose", 1, "a line a report")):
        group.add_argument(
            f"-{flag[0]}", f"--{flag}", dest="verbosity", action="store_const", const=value,
            default=0, help=f"show {text}; the log file in the folder has all",
        )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, function: str, text: str, folder: bool, config: bool
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        if config:
            command.add_argument("--config", required=True, help="YAML file, as in core/configs")
        if folder:
            command.add_argument(
                "--run-dir", type=Path, required=not config, help="folder of the run"
            )
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="e.g. stage_split=0.3"
        )
        return command

    run = add("run", "core.commands.run:run", "train, generate and score one model", True, True)
    add_verbosity(run)
    add(
        "compare",
        "core.commands.run:compare",
        "the easy stage against plain DP-SGD, same budget",
        False,
        True,
    )
    reproduce = add(
        "reproduce",
        "core.commands.reproduce:reproduce",
        "one published run, in time slots",
        False,
        False,
    )
    reproduce.add_argument("--dataset", required=True, help="preset in core/configs, such as mnist")
    reproduce.add_argument("--epsilon", type=float, default=10.0)
    reproduce.add_argument("--budget", default="1h", help="time of this slot: 600, 90s, 20m, 2h")
    reproduce.add_argument("--results", type=Path, default=Path("RESULTS.md"))
    add(
        "account",
        "core.commands.account:account",
        "what a configuration spends; reads no data",
        False,
        True,
    )
    smaller = add(
        "scale-down",
        "core.commands.scale_down:scale_down",
        "a cheap stand-in with the same noise over batch size, to search on public data",
        False,
        True,
    )
    smaller.add_argument("--factor", type=float, required=True, help="such as 4; above 1")
    smaller.add_argument("--out", type=Path, required=True, help="YAML file to write")
    again = add(
        "generate",
        "core.commands.run:generate",
        "draw more images from a finished run or a bundle",
        False,
        False,
    )
    source = again.add_mutually_exclusive_group(required=True)
    source.add_argument("--run-dir", type=Path, help="folder of the run")
    source.add_argument("--bundle", type=Path, help="released bundle with a generator")
    again.add_argument("--num-images", type=int, required=True)
    again.add_argument("--out", type=Path, required=True, help="npz file to write")
    scored = add(
        "evaluate", "core.commands.run:evaluate", "score a finished run's images again", True, False
    )
    for command in (again, scored):
        command.add_argument(
            "--ema-length", type=float, metavar="SIGMA_REL",
            help="average the weights over another length, 0.04 to 0.25 of the training; the run "
            "needs training.posthoc_ema=true",
        )  # fmt: skip
    fetched = commands.add_parser("prepare", help="where a data set comes from; fetches it")
    fetched.set_defaults(command="core.commands.prepare:prepare")
    fetched.add_argument("--dataset", required=True, help="such as mnist, cifar10, celeba")
    fetched.add_argument("--out", type=Path, default=Path("runs/data"), help="folder to put it in")
    inspect = add(
        "inspect",
        "core.commands.run:inspect",
        "for the owner's eyes: nearest real images and a membership attack",
        True,
        False,
    )
    inspect.add_argument(
        "--max-images", type=int, default=2000, help="most images of either side; 2000"
    )
    ledger = commands.add_parser("ledger", help="what was spent on each data set")
    ledger.set_defaults(command="core.commands.run:ledger")
    ledger.add_argument("action", choices=("show", "verify", "accept-loss"))
    ledger.add_argument("--folder", type=Path, help="runtime.ledger; its default if not given")
    ledger.add_argument("--file", type=Path, help="accept-loss: the lost or damaged ledger")
    ledger.add_argument(
        "--reason", default="", help="accept-loss: one sentence, quoted by every later privacy card"
    )
    release = commands.add_parser("release", help="write or verify the bundle to publish")
    release.set_defaults(command="core.commands.run:release")
    release.add_argument("--run-dir", type=Path, help="folder of a finished run")
    release.add_argument("--out", type=Path, required=True, help="new folder of the bundle")
    release.add_argument("--verify", action="store_true", help="check the digests of --out")
    release.add_argument(
        "--formats", default="folder,npz,parquet,generator", help="any of them, by commas"
    )
    release.add_argument(
        "--license", default="unknown", help="for README.md, as the Hugging Face Hub names it"
    )
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Whoever reads, as `head`, may have enough.
    sys.exit(main())
