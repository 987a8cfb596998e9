"""Python runs this at its start: a trainer that at a large learning rate divides by zero."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from late import Late

STEP, RATE = 5, 0.01


def spoil(training) -> None:
    private_stage = training.private_stage

    def buggy_stage(config, *arguments, **settings):
        stage = private_stage(config, *arguments, **settings)
        if config.private_training.learning_rate >= RATE:
            step = stage.step
            stage.step = lambda number: step(number // (number != STEP))
        return stage

    training.private_stage = buggy_stage


Late("core.training.stages", spoil)
