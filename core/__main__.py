# PYTHON_ARGCOMPLETE_OK
"""Command line of one run and its folder, without Ray and MLflow: `python -m core`."""

import argparse
import logging
import pkgutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from core.config import Config
from core.config.keys import known_keys
from core.errors import StoppedError, UserError
from core.io.completion import answer_shell, completed, yaml_files
from core.io.files import local_folder

EXAMPLES = {
    "init": "photos --epsilon 10 --publish-counts",
    "run": "--config core/configs/digits.yaml stage_split=0.3",
    "compare": "--config core/configs/digits.yaml --methods moments,dp_merf",
    "reproduce": "--dataset mnist --budget 20m dataset.path=FOLDER",
    "account": "--config core/configs/digits.yaml privacy.target_epsilon=1",
    "scale-down": "--config core/configs/mnist.yaml --factor 4 --out smaller.yaml",
    "prepare": "--dataset mnist --out runs/data",
    "generate": "--bundle BUNDLE --num-images 1000 --out more.npz",
    "evaluate": "--run-dir RUN --ema-length 0.1",
    "inspect": "--run-dir RUN --max-images 500",
    "audit": "--run-dir RUN --black-box 1000",
    "ledger": "show",
    "release": "--run-dir RUN --out BUNDLE --license cc-by-4.0",
}
"""How each command may be called; its help shows it."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, 2 for a user's error, 3 at a time limit, 130 for Ctrl-C.
    """
    parser = _parser()
    answer_shell(parser)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        options, more = parser.parse_known_args(arguments)
        if more:  # argparse takes key=value arguments on one side of the flags alone.
            if "overrides" not in options or any(argument.startswith("-") for argument in more):
                parser.error(f"unrecognized arguments: {' '.join(more)}")
            options.overrides += more
        pkgutil.resolve_name(options.command)(options)  # Some need torch, not all.
    except StoppedError as stop:
        print(stop, file=sys.stderr)
        return 3
    except (UserError, OSError) as error:  # OSError: names the path.
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


def add_folder_options(parser: argparse.ArgumentParser) -> None:
    """Adds what a configuration for a folder of images depends on."""
    parser.add_argument("--epsilon", type=float, help="what one trial may spend, such as 10")
    time = parser.add_mutually_exclusive_group()
    time.add_argument("--minutes", type=float, help="time of one trial on this machine; 10")
    time.add_argument("--gpu-hours", type=float, help="time of all four trials on its GPU")
    text = "N, class names, image size and colour may become public, as a release makes them"
    parser.add_argument("--publish-counts", action="store_true", help=text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, text: str, module: str = "run", config: bool = False, folder: bool = False
    ) -> argparse.ArgumentParser:
        """A command, done by the function of its name in a module of `core.commands`."""
        example = f"example: python -m core {name} {EXAMPLES[name]}"
        command = commands.add_parser(name, help=text, description=text, epilog=example)
        command.set_defaults(command=f"core.commands.{module}:{name.replace('-', '_')}")
        if config:
            text = "YAML file, as in core/configs"
            yaml_files(command.add_argument("--config", required=True, help=text))
        if folder:
            text, place = "folder of the run", _folder("--run-dir")
            command.add_argument("--run-dir", type=place, required=not config, help=text)
        return command

    _add_training(add)
    _add_what_follows(add)
    return parser


def _folder(flag: str) -> Callable[[str], Path]:
    return lambda text: Path(local_folder(flag, text))


def _overridable(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    text = "e.g. stage_split=0.3"
    keys = command.add_argument("overrides", nargs="*", metavar="key=value", help=text)
    completed(keys, lambda: [f"{key}=" for key in known_keys(Config)])
    return command


def _add_training(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Commands up to a finished run."""
    text = "a configuration for a folder of images, with the reason for each choice"
    begun = add("init", text, "init")
    begun.add_argument("folder", type=Path, help="e.g. photos, with a folder for each class")
    begun.add_argument("--out", type=Path, help="YAML file to write; the sweep's lies beside it")
    add_folder_options(_overridable(begun))
    run = add("run", "train, generate and score one model", config=True, folder=True)
    add_verbosity(_overridable(run))
    text = "the easy stage against plain DP-SGD, and other methods, same budget"
    compared = _overridable(add("compare", text, config=True))
    compared.add_argument("--methods", default="", help="also these, such as moments,dp_merf")
    reproduce = _overridable(add("reproduce", "one published run, in time slots", "reproduce"))
    reproduce.add_argument("--dataset", required=True, help="preset in core/configs, such as mnist")
    reproduce.add_argument("--epsilon", type=float, default=10.0)
    reproduce.add_argument("--budget", default="1h", help="time of this slot: 600, 90s, 20m, 2h")
    reproduce.add_argument("--results", type=Path, default=Path("RESULTS.md"))
    text = "what a configuration spends; reads no data"
    _overridable(add("account", text, "account", config=True))
    text = "a cheap stand-in with the same noise over batch size, to search on public data"
    smaller = _overridable(add("scale-down", text, "scale_down", config=True))
    smaller.add_argument("--factor", type=float, required=True, help="such as 4; above 1")
    smaller.add_argument("--out", type=Path, required=True, help="YAML file to write")
    fetched = add("prepare", "where a data set comes from; fetches it", "prepare")
    fetched.add_argument("--dataset", required=True, help="such as mnist, cifar10, celeba")
    fetched.add_argument("--out", type=Path, default=Path("runs/data"), help="folder to put it in")


def _add_what_follows(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Commands for finished runs, bundles and ledgers."""
    again = _overridable(add("generate", "draw more images from a finished run or a bundle"))
    source = again.add_mutually_exclusive_group(required=True)
    source.add_argument("--run-dir", type=Path, help="folder of the run")
    source.add_argument("--bundle", type=Path, help="released bundle with a generator")
    again.add_argument("--num-images", type=int, required=True)
    again.add_argument("--out", type=Path, required=True, help="npz file to write")
    scored = _overridable(add("evaluate", "score a finished run's images again", folder=True))
    for command in (again, scored):
        command.add_argument(
            "--ema-length", type=float, metavar="SIGMA_REL",
            help="average the weights over another length, 0.04 to 0.25 of the training; the run "
            "needs training.posthoc_ema=true",
        )  # fmt: skip
    text = "for the owner's eyes: nearest real images and a membership attack"
    inspect = _overridable(add("inspect", text, folder=True))
    inspect.add_argument(
        "--max-images", type=int, default=2000, help="most images of either side; 2000"
    )
    text = "canaries against what the plan of a run releases: lower bounds of epsilon"
    audit = add("audit", text, "audit", folder=True)
    text = "made-up examples, each one parameter of DP-SGD; 10000"
    audit.add_argument("--canaries", type=int, default=10_000, help=text)
    text = "also made-up images: trains anew on half of them and guesses which from synthetic ones"
    audit.add_argument("--black-box", type=int, metavar="COUNT", help=text)
    ledger = add("ledger", "what was spent on each data set")
    ledger.add_argument("action", choices=("show", "verify", "restore", "accept-loss"))
    ledger.add_argument("--folder", type=Path, help="runtime.ledger; its default if not given")
    text = "restore: runtime.ledger_copy, if the folder does not name it"
    ledger.add_argument("--copy", metavar="s3://BUCKET/FOLDER", help=text)
    ledger.add_argument("--file", type=Path, help="accept-loss: the lost or damaged ledger")
    ledger.add_argument(
        "--reason", default="", help="accept-loss: one sentence, quoted by every later privacy card"
    )
    release = add("release", "write, verify or check the bundle to publish")
    release.add_argument("--run-dir", type=Path, help="folder of a finished run")
    release.add_argument("--out", type=_folder("--out"), help="new folder of the bundle")
    what = release.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="check the digests of --out")
    text = "what to see before signing: epsilons, history, audit, what is not covered; writes none"
    what.add_argument("--check", action="store_true", help=text)
    release.add_argument(
        "--formats", default="folder,npz,parquet,generator", help="any of them, by commas"
    )
    release.add_argument(
        "--license", default="unknown", help="for README.md, as the Hugging Face Hub names it"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Whoever reads, as `head`, may have enough.
    sys.exit(main())
