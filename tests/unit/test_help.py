"""Help and completion: an example of each command that parses, and what a shell is offered."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from core.__main__ import EXAMPLES as OF_CORE
from core.__main__ import _parser as core_parser
from core.config import load, parse_overrides
from sweep.__main__ import EXAMPLES as OF_SWEEP
from sweep.__main__ import _parser as sweep_parser
from sweep.run import main as run_main

ROOT = Path(__file__).resolve().parents[2]
PARSERS = {"core": core_parser(), "sweep": sweep_parser()}
EXAMPLES = [("core", *each) for each in OF_CORE.items()]
EXAMPLES += [("sweep", *each) for each in OF_SWEEP.items()]


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize(("package", "name", "example"), EXAMPLES)
def test_the_help_of_a_command_shows_an_example_that_is_right(package, name, example):
    command = commands_of(PARSERS[package])[name]
    told = " ".join(command.format_help().split())
    assert f"example: python -m {package} {name} {example}" in told
    options = PARSERS[package].parse_args([name, *shlex.split(example)])
    if "config" in options and package == "core":
        load(ROOT / options.config, parse_overrides(options.overrides))


def test_every_command_has_one():
    assert {*OF_CORE} == {*commands_of(PARSERS["core"])}
    assert {*OF_SWEEP} == {*commands_of(PARSERS["sweep"])}


def test_the_help_of_a_sweep_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        run_main(["--help"])
    assert "example: python sweep/run.py --data photos --epsilon 10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("-m core acc", {"account"}),
        ("-m core run --config core/configs/dig", {"core/configs/digits.yaml"}),
        ("-m core run --config x.yaml central_images.k", {"central_images.kind="}),
        ("-m sweep re", {"report"}),
        ("sweep/run.py objective.m", {"objective.metric="}),
        ("sweep/run.py privacy.s", {"privacy.scope=", "privacy.selection_law="}),
    ],
)
def test_a_shell_is_offered_commands_files_and_keys(typed, expected, tmp_path):
    """As argcomplete's own script asks."""
    pytest.importorskip("argcomplete")
    line = f"python {typed}"
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": str(3 if typed.startswith("-m") else 2),
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    program = typed.split()[: 2 if typed.startswith("-m") else 1]
    subprocess.run(
        [sys.executable, *program], env={**os.environ, **asked}, cwd=ROOT, timeout=120, check=True
    )
    assert expected <= {each.rstrip() for each in answer.read_text().split("\n")}
