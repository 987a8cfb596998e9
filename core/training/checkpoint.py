"""Atomic checkpoints of one run; they hold no key and no generator state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from core.errors import ConfigError, storage_errors
from core.io.files import write_whole


@dataclass
class Checkpoints:
    """The latest state of a run, in one file that is either complete or absent.

    Args:
        folder: `run_dir/checkpoints`.
        identity: of the run; another identity is refused.
        changed: what differs from how the folder was begun, in words, for that refusal.
        keep: called once a state lies on the disk.
    """

    folder: Path
    identity: str
    name: str = "last.pt"
    changed: Sequence[str] = ()
    keep: Callable[[], None] = lambda: None

    @property
    def path(self) -> Path:
        """The file that holds the latest state."""
        return self.folder / self.name

    def save(self, state: dict[str, Any]) -> None:
        """Writes `state`, or leaves the earlier file untouched.

        Raises:
            StorageError: it cannot be written.
        """
        content = {**state, "identity": self.identity}
        with storage_errors(self.folder):
            write_whole(self.path, partial(torch.save, content), private=True)
        self.keep()

    def reached(self) -> tuple[str, int]:
        """Stage and step of the latest state; an empty name and 0 when there is none.

        Raises:
            ConfigError: it is of another identity.
        """
        state = self.load() or {"stage": "", "step": 0}
        return state["stage"], state["step"]

    def load(self) -> dict[str, Any] | None:
        """The latest state, on the CPU, or None when there is none.

        Raises:
            ConfigError: the state is of another identity: nothing of it may be replayed.
        """
        if not self.path.exists():
            return None
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if state.pop("identity") != self.identity:
            what = "; ".join(self.changed) or "configuration, data set, trial, secret or code"
            raise ConfigError(
                f"the checkpoint '{self.path}' belongs to another run ({what}): restore what it "
                "was begun with, or choose a new run folder (in a sweep remove the trial's), which "
                "draws new noise and is charged again"
            )
        return state
