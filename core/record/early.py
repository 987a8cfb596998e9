"""Names of early scores in reports, and the end of a run that they stopped."""

STAGE = "early_score"
"""What a report of such a score has as its stage."""
ENDED_EARLY = "stopped"
"""Stage of the last report of a run that was stopped."""
PROGRESS = "progress"
"""Share of all steps: the logical time of such a report."""


class StoppedEarlyError(Exception):
    """The run was asked to stop; raised on all ranks after the same step.

    Args:
        scores: those for which it was.
    """

    def __init__(self, step: int, scores: dict[str, float]) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.scores = step, scores
