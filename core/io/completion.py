"""Completion of command lines in a shell, by the package argcomplete where it is installed."""

import argparse
import importlib
import os
from collections.abc import Callable, Iterable

Answers = Callable[[], Iterable[str]]
"""What may stand in a place, as of now."""


def completed(action: argparse.Action, answers: Answers) -> None:
    """Has the shell offer those of `answers` that begin with what was typed."""

    def completer(prefix: str, **_: object) -> list[str]:
        return [each for each in answers() if each.startswith(prefix)]

    vars(action)["completer"] = completer  # Where argcomplete looks.


def yaml_files(action: argparse.Action) -> None:
    """Has the shell offer files of this kind, and folders."""
    if _is_asked():
        files = importlib.import_module("argcomplete.completers").FilesCompleter
        vars(action)["completer"] = files(("yaml",))


def answer_shell(parser: argparse.ArgumentParser) -> None:
    """Where a shell asks for completions, prints them and ends the process; else does nothing."""
    if _is_asked():
        importlib.import_module("argcomplete").autocomplete(parser)  # Optional, so not above.


def _is_asked() -> bool:
    return "_ARGCOMPLETE" in os.environ
