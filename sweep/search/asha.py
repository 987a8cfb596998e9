"""Early stopping by ASHA: scores during training end poor trials.

A worker asks after each early score whether to go on, and waits. So a trial ends exactly there,
pays for no later step, settles with the ledger, and leaves no process that Tune would have to kill.
"""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import ray
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from core.record.early import PROGRESS
from sweep.config.sweep import SweepConfig
from sweep.results.table import Row

_DECISION_TIMEOUT_S = 120.0
"""Seconds that a worker waits; then it goes on, and may be stopped at the next score."""


class Verdicts:
    """An actor that passes the scheduler's verdicts on; by trial and share of the steps."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple[str, float], asyncio.Future[bool]] = {}

    async def give(self, trial: str, progress: float, should_continue: bool) -> None:
        """Tells whether a trial goes on; the first word counts."""
        verdict = self._verdict(trial, progress)
        if not verdict.done():
            verdict.set_result(should_continue)

    async def ask(self, trial: str, progress: float) -> bool:
        """Waits for the verdict."""
        try:
            verdict = asyncio.shield(self._verdict(trial, progress))
            return await asyncio.wait_for(verdict, _DECISION_TIMEOUT_S)
        except TimeoutError:
            return True

    def _verdict(self, trial: str, progress: float) -> "asyncio.Future[bool]":
        new = asyncio.get_running_loop().create_future()
        return self._verdicts.setdefault((trial, progress), new)


def start_verdicts() -> Any:
    """Starts the actor beside the driver, where no autoscaler takes its machine away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Verdicts)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote()


class Asha(ASHAScheduler):
    """ASHA (Li et al. 2020) that leaves it to the trials to end when they are told to.

    Args:
        sweep: objective and rungs.
        verdicts: see `Verdicts`.
        ended: trials of earlier drivers that are not tried again: newer ones compete with them.
    """

    def __init__(self, sweep: SweepConfig, verdicts: Any, ended: Sequence[Row]) -> None:
        self._score = sweep.run.early_metric
        super().__init__(
            time_attr=PROGRESS,
            metric=self._score,
            mode=sweep.objective.mode,
            max_t=1.0,  # type: ignore[arg-type]  # Never reported: what is complete is not stopped.
            grace_period=sweep.asha.grace_fraction,  # type: ignore[arg-type]
            reduction_factor=sweep.asha.reduction_factor,
        )
        self._verdicts = verdicts
        for row in ended:
            self.on_trial_add(None, SimpleNamespace(trial_id=row.trial))  # type: ignore[arg-type]
            for progress, score in row.folder.early_scores().items():
                self._judge(SimpleNamespace(trial_id=row.trial), progress, score)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Judges a trial; Tune itself never stops one."""
        if PROGRESS in result:
            progress = result[PROGRESS]
            should_continue = self._judge(trial, progress, result[self._score])
            self._verdicts.give.remote(result["trial"], progress, should_continue)
        return TrialScheduler.CONTINUE

    def _judge(self, trial: Any, progress: float, score: float) -> bool:
        result = {PROGRESS: progress, self._score: score}
        verdict = super().on_trial_result(None, trial, result)  # type: ignore[arg-type]
        return verdict != TrialScheduler.STOP
