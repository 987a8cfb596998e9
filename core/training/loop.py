"""One training loop for all stages; the step, plain or private, is injected.

Every random number is drawn from a counter, never from a generator's running state, so a step
can be replayed exactly and does not depend on the number of ranks.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from core import distributed
from core.config import Config
from core.diffusion.denoiser import Denoiser
from core.diffusion.ema import Ema
from core.errors import NotFiniteError, StoppedError
from core.io.terminal import Report
from core.training.checkpoint import Checkpoints

Observer = Callable[[int], None]
"""Called with the number of all steps done, at the start of a stage as well.

What it raises ends the training. It must not change anything that is trained, nor any state of a
random generator.
"""


@dataclass
class Stage:
    """One stage: how long, what a step does, and the optimizer whose state counts.

    Attributes:
        step: takes the number of the step within the stage, returns the mean loss of the batch
            over all ranks as a tensor.
        public_loss: of what the step has released, on public input, `[1]`; None where the loss of
            the step itself may decide whether the run goes on.
        offset: steps of earlier stages; reports and observers count over all stages.
    """

    name: str
    num_steps: int
    step: Callable[[int], torch.Tensor]
    optimizer: torch.optim.Optimizer
    public_loss: Callable[[int], torch.Tensor] | None = None
    offset: int = 0

    def at(self, done: int) -> str:
        """The place in the stage, in words."""
        return f"in {self.name} at step {done} of {self.num_steps}"


@dataclass(frozen=True)
class Model:
    """The network and its moving averages."""

    denoiser: Denoiser
    ema: Ema


@dataclass
class Loop:
    """Trains a model stage by stage, with checkpoints and reports.

    Attributes:
        observers: called in their order after each step.
        deadline: by the monotonic clock of rank 0; after it the next step is the last.
        in_danger: asked on rank 0 after each step: whether to keep the state at once.
    """

    config: Config
    model: Model
    checkpoints: Checkpoints
    report: Report
    observers: Sequence[Observer] = ()
    deadline: float = math.inf
    in_danger: Callable[[], bool] | None = None

    def run(self, stage: Stage) -> None:
        """Runs a stage from its last checkpoint, if there is one, to its end.

        Raises:
            StoppedError: the deadline has passed; the state is kept.
            NotFiniteError: a number of the state is NaN or infinite; it is neither kept nor shown.
        """
        runtime, start = self.config.runtime, self._resume(stage)
        self._require_finite(stage, start, self._state(stage))
        self._observe(stage, start)
        began = time.monotonic()
        for number in range(start, stage.num_steps):
            loss = stage.step(number)
            self.model.ema.update(self.model.denoiser)
            done = number + 1
            # What may decide: what was released, or follows from it; no private loss or gradient.
            decides = loss if stage.public_loss is None else stage.public_loss(number)
            self._require_finite(stage, done, [*self.model.denoiser.parameters(), decides])
            last, late, danger = done == stage.num_steps, self._is_late(), self._is_in_danger()
            if done % runtime.log_every == 0 or last or done == start + 1:
                seconds = (time.monotonic() - began) / (done - start)
                told = {"step": stage.offset + done, "stage": stage.name, "loss": float(loss)}
                self.report({**told, "seconds_per_step": seconds})
            # After the report: killed in between, a run reports again rather than never.
            if done % runtime.checkpoint_every == 0 or last or late or danger:
                self._require_finite(stage, done, self._state(stage))
                self._save(stage, done)
            observed = time.monotonic()
            self._observe(stage, done)
            began += time.monotonic() - observed  # Not a part of the step.
            if late and not last:
                raise StoppedError(stage.at(done))

    def _resume(self, stage: Stage) -> int:
        """Restores the state of the stage; returns how many of its steps are done."""
        state = distributed.on_rank_0(self.checkpoints.load)
        if state is None or state["stage"] != stage.name:
            return 0
        self.model.denoiser.load_state_dict(state["denoiser"])
        self.model.ema.load_state_dict(state["ema"])
        stage.optimizer.load_state_dict(state["optimizer"])
        return state["step"]

    def _observe(self, stage: Stage, done: int) -> None:
        try:
            for observer in self.observers:
                observer(stage.offset + done)
        except NotFiniteError as error:  # Of a picture or a score.
            raise NotFiniteError(f"{stage.at(done)} {error}") from error

    def _is_late(self) -> bool:
        limited = self.deadline < math.inf
        return limited and distributed.on_rank_0(lambda: time.monotonic() > self.deadline)

    def _is_in_danger(self) -> bool:
        if self.in_danger is None:
            return False
        return distributed.broadcast_object(distributed.rank() == 0 and self.in_danger())

    def _state(self, stage: Stage) -> list[torch.Tensor]:
        """Parameters, averages and moments: what a checkpoint holds."""
        ema = self.model.ema
        state = [*self.model.denoiser.parameters(), *ema.module.parameters()]
        state += [] if ema.power is None else [ema.power.values]
        for moments in stage.optimizer.state.values():
            state += [each for each in moments.values() if torch.is_tensor(each) and each.ndim]
        return state

    def _require_finite(self, stage: Stage, done: int, state: Sequence[torch.Tensor]) -> None:
        """Refuses, on all ranks alike, what every later step would only spend budget on."""
        largest = nn.utils.get_total_norm([each.detach() for each in state], math.inf)
        if distributed.sum_over_ranks((~largest.isfinite()).float()):
            section = "warm_up" if stage.name == "warm_up" else "private_training"
            rate = stage.optimizer.param_groups[0]["lr"]
            raise NotFiniteError(
                f"{stage.at(done)} the training diverged: its loss or parameters are not finite, "
                "so the run has failed and nothing of it can be used; start anew with "
                f"{section}.learning_rate below {rate:g}"
            )

    def _save(self, stage: Stage, step: int) -> None:
        """Raises `StorageError` on all ranks where rank 0 cannot write: none trains on unsaved."""
        state = {
            "stage": stage.name,
            "step": step,
            "denoiser": self.model.denoiser.state_dict(),
            "ema": self.model.ema.state_dict(),
            "optimizer": stage.optimizer.state_dict(),
        }
        distributed.on_rank_0(lambda: self.checkpoints.save(state))
