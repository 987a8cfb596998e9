"""Python runs this at its start: a trainer that divides by zero in its sixth private step."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from late import Late

STEP = 5


def spoil(training) -> None:
    private_stage = training.private_stage

    def buggy_stage(*arguments, **settings):
        stage = private_stage(*arguments, **settings)
        step = stage.step
        stage.step = lambda number: step(number // (number != STEP))
        return stage

    training.private_stage = buggy_stage


Late("core.training", spoil)
