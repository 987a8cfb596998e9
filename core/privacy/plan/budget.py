"""Budget of a run: what all its trials may spend together, which the ledger keeps."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.config import Config
from core.privacy.accounting import renyi, solve
from core.privacy.accounting.mechanism import Mechanism, discretization_for, grouped


@dataclass(frozen=True)
class RunBudget:
    """What all trials of one run may spend together, or of a selection what its one release is.

    Attributes:
        epsilon: the target.
        adaptive: whether the noise of a trial may depend on results of others. If so, what was
            executed is added up by the filter at one fixed order; if not, all that was ever
            reserved is composed by PLD, as the theorem covers no stopping by results; where
            references bound the trials the whole target counts from the first one on.
        alone: whether no other run may have used the data before.
        selection: identity of the selection that the run is; empty under the other scopes. Its
            trials together are one (epsilon, delta)-private release and have no budget.
        tuning_trials: how many trials have a reference, the final run aside; 0 where none has.
        references: of these trials and of the final run, in words.
        has_final_run: whether one comes beside these trials.
    """

    epsilon: float
    adaptive: bool
    alone: bool = False
    selection: str = ""
    tuning_trials: int = 0
    references: str = ""
    has_final_run: bool = True

    @property
    def is_one_release(self) -> bool:
        """Whether its trials are charged as a whole with the first of them."""
        return bool(self.selection or self.tuning_trials)

    def total(
        self,
        executed: Sequence[Mechanism],
        reserved: Sequence[Mechanism],
        delta: float,
        relation: str,
    ) -> float:
        """Epsilon of the sweep.

        Args:
            executed: what counts: executed steps of trials that ended, all of those that run.
            reserved: the same with all steps that were ever reserved.
        """
        if self.tuning_trials:
            return self.epsilon if reserved else 0.0
        if not self.adaptive:
            mechanisms = grouped(reserved)
            grid = discretization_for(mechanisms, self.epsilon)
            return solve.epsilon_of_mechanisms(mechanisms, delta, relation, grid)
        order = renyi.best_order(self.epsilon, delta)
        return renyi.divergence(executed, order) + renyi.offset(order, delta)


def run_budget(config: Config, selection: str = "") -> RunBudget | None:
    """The budget of a run; None under scope `trial`, which caps each trial alone.

    The one run that `public` allows has no second trial to adapt, and no run before it; its search
    on public data has no budget.

    Args:
        selection: identity of the sweep's release, under scope `selection`.
    """
    privacy = config.privacy
    if privacy.covers.is_secret:
        return RunBudget(privacy.target_epsilon, adaptive=False, selection=selection)
    last = privacy.covers.tunes_first
    if last or (privacy.has_shares and privacy.tuning_reference):
        references = f"tuning {list(privacy.tuning_reference)}"
        references += f", final {list(privacy.final_reference)}" if last else ""
        return RunBudget(
            privacy.target_epsilon,
            adaptive=True,
            tuning_trials=privacy.num_shares,
            references=references,
            has_final_run=last,
        )
    if privacy.covers.splits_target:
        return RunBudget(privacy.target_epsilon, privacy.adaptive)
    if privacy.covers.chosen_on_public_data and not config.dataset.public:
        return RunBudget(privacy.target_epsilon, adaptive=False, alone=True)
    return None
