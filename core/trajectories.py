"""Warm-ups that trials share: with the same central images one trajectory, left at each's split.

Each optimisation step of the warm-up is a function of the state before it and its number, so a
trial that starts from another's state of step s ends where it would have ended alone.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import distributed
from core.checkpoint import Checkpoints
from core.config import Config, flatten
from core.locks import held

_KEPT = 6
"""States of one trajectory on disk; each is as large as a checkpoint."""
_PATIENCE = 120.0
"""Seconds in which other trials may be writing theirs."""
_DECIDES = ("seed", "model.", "diffusion.", "warm_up.", "training.", "runtime.channels_last")
_LENGTH = "training.num_steps"


@dataclass
class Trajectory:
    """The kept states of the warm-up on certain central images with certain settings.

    Args:
        folder: that trials share; `<step>.pt` lie in a folder of it for each trajectory.
        identity: of the trajectory, see `trajectory_of`.

    Privacy: post-processing of the central images alone.
    """

    folder: Path
    identity: str

    def start(self, checkpoints: Checkpoints, num_steps: int) -> None:
        """Lets a run that has not begun go on from the latest state within its warm-up."""
        if checkpoints.load() is not None:
            return
        usable = [step for step in self._steps() if step <= num_steps]
        state = self._at(max(usable)).load() if usable else None
        if state is not None:  # Another trial may have put a better one in its place.
            checkpoints.save(state)

    def keep(self, checkpoints: Checkpoints) -> None:
        """Keeps the state with which a run ends its warm-up."""
        state = checkpoints.load()
        assert state is not None
        with held(self.folder / f"{self.identity[:16]}.lock", _PATIENCE):
            if state["step"] not in self._steps():
                self._at(state["step"]).save(state)
            steps = self._steps()
            if len(steps) > _KEPT:  # The one that saves the fewest steps goes; never the longest.
                gaps = zip(steps[:-1], [0, *steps], strict=False)
                least = min(gaps, key=lambda gap: gap[0] - gap[1])[0]
                self._at(least).path.unlink()

    def _at(self, step: int) -> Checkpoints:
        return Checkpoints(self.folder / self.identity[:16], self.identity, f"{step}.pt")

    def _steps(self) -> list[int]:
        found = (self.folder / self.identity[:16]).glob("*.pt")
        return sorted(int(path.stem) for path in found)


def trajectory_of(folder: Path, config: Config, central: str) -> Trajectory:
    """The trajectory of a run.

    Args:
        folder: that the trials of a sweep share.
        central: identity of the central images.
    """
    settings: dict[str, Any] = {
        key: value
        for key, value in flatten(config).items()
        if key.startswith(_DECIDES) and key != _LENGTH
    }
    # Other ranks sum in another order: equal only to rounding.
    parts = [settings, central, distributed.world_size()]
    text = json.dumps(parts, sort_keys=True)
    return Trajectory(folder / "warm_up", hashlib.sha256(text.encode()).hexdigest())
