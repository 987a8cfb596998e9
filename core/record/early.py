"""What early scores and trials that they stopped are called, and what is kept of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "early_scores.json"
STAGE = "early_score"
"""What a report of such a score has as its stage."""
STOPPED, ENDED_EARLY = "stopped.json", "stopped"
"""What a run that was stopped leaves in place of an evaluation, and its last report's stage."""
PROGRESS = "progress"
"""Share of all steps: the logical time of such a report."""
GoesOn = Callable[[float], bool]
"""Asked on rank 0 with the share of the steps that are done: whether the run shall go on."""


class StoppedEarlyError(Exception):
    """The run was asked to stop; raised on all ranks after the same step."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


def stored_scores(run_dir: Path) -> dict[float, float]:
    """Early scores of a run by the share of the steps, in their order."""
    path = run_dir / FILE
    kept: dict[str, Any] = json.loads(path.read_text())["scores"] if path.exists() else {}
    return {float(share): value for share, value in kept.items()}
