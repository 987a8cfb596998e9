"""Names of early scores in reports, and the end of a run that they stopped."""

from collections.abc import Callable

STAGE = "early_score"
"""What a report of such a score has as its stage."""
ENDED_EARLY = "stopped"
"""Stage of the last report of a run that was stopped."""
PROGRESS = "progress"
"""Share of all steps: the logical time of such a report."""
GoesOn = Callable[[float], bool]
"""Asked on rank 0 with the share of the steps that are done: whether the run shall go on."""


class StoppedEarlyError(Exception):
    """The run was asked to stop; raised on all ranks after the same step."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
