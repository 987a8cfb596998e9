"""Atomic checkpoints of one run; they hold no key and no generator state."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.errors import ConfigError, stored


@dataclass
class Checkpoints:
    """The latest state of a run, in one file that is either complete or absent.

    Args:
        folder: `run_dir/checkpoints`.
        identity: digest of configuration, data set and trial; another identity is refused.
    """

    folder: Path
    identity: str
    name: str = "last.pt"

    @property
    def path(self) -> Path:
        """The file that holds the latest state."""
        return self.folder / self.name

    def save(self, state: dict[str, Any]) -> None:
        """Writes `state`, or leaves the earlier file untouched.

        Raises:
            StorageError: it cannot be written.
        """
        content = io.BytesIO()  # What fails below is the storage: torch's own errors are not.
        torch.save({**state, "identity": self.identity}, content)
        temporary = self.path.with_suffix(".tmp")
        with stored(self.folder):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)  # Half a file would keep the space.

    def check(self) -> None:
        """Whether there is no checkpoint or one of this identity.

        Raises:
            ConfigError: it is of another configuration, data set, trial or secret.
        """
        self.load()

    def load(self) -> dict[str, Any] | None:
        """The latest state, on the CPU, or None when there is none.

        Raises:
            ConfigError: the state belongs to another configuration, data set or trial.
        """
        if not self.path.exists():
            return None
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if state.pop("identity") != self.identity:
            raise ConfigError(
                f"the checkpoint '{self.path}' belongs to another configuration, data set or "
                "trial: choose a new run folder, or restore what the run was started with"
            )
        return state
