"""Search of the space, in which points that the budget cannot pay never become trials."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import optuna
from ray.tune.search.optuna import OptunaSearch

from core.config import short_digest
from core.record.early import ENDED_EARLY
from sweep.config.grid import grid_points
from sweep.config.sweep import SweepConfig
from sweep.search.feasible import infeasible_reason
from sweep.search.study import distributions, open_storage

_REPLICATE = "replicate"
MAX_ATTEMPTS = 200
"""Points in a row that may be unaffordable or known before the search gives up."""


class FeasibleSearch(OptunaSearch):
    """Optuna's search that prunes unaffordable or repeated points before they become trials.

    The study lives in the sweep's folder, so a sweep that is started again goes on with all that
    it learnt: points that were interrupted or failed are tried again first.

    Args:
        sweep: space, objective and folder.
        ended: by trial id of the trials that are not tried again their objectives, or None.
        on_pruned: called with the point and the reason.
        entropy: of a random search, see `settings_entropy`.
        over: whether no further trial is to begin.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        ended: Mapping[str, Sequence[float] | None],
        on_pruned: Callable[[dict[str, Any], str], None],
        entropy: int = 0,
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._sweep, self._over = sweep, over
        self._known = {digest: "tried earlier" for digest in ended}
        self._on_pruned = on_pruned
        self._asked: dict[str, str] = {}
        self._gave_up = ""
        self._same = SameError(sweep.max_same_error)
        # A grid is known to hold as many points to try as are asked for.
        size = len(grid_points(sweep.choices)) if sweep.sampler == "grid" else 0
        self._attempts = max(MAX_ATTEMPTS, size + 1)
        storage = open_storage(sweep.folder)
        earlier = _settle(sweep, storage, ended)
        super().__init__(
            space=distributions(sweep),
            metric=sweep.metrics if sweep.further_objectives else sweep.objective.metric,
            mode=[objective.mode for objective in sweep.objectives]
            if sweep.further_objectives
            else sweep.objective.mode,
            # Another seed after a restart, which would draw the same again.
            sampler=_sampler(sweep, sweep.search_seed + earlier, entropy),
            study_name=sweep.name,
            storage=storage,
        )

    @property
    def gave_up(self) -> str:
        """Why no further point was found; empty if the search did not give up."""
        return self._gave_up or self.same_error

    @property
    def same_error(self) -> str:
        """The error with which so many trials in a row failed that the search gave up, or empty."""
        return self._same.reached

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next affordable, new point, or FINISHED when none was found or all fail alike."""
        if self.same_error or self._over():
            return OptunaSearch.FINISHED
        reason = ""
        for attempt in range(self._attempts):
            asked = f"{trial_id}/{attempt}"
            point = super().suggest(asked)
            assert point is not None
            number, parameters, reason = self._judge(point)
            if not reason:
                self._asked[trial_id] = asked
                self._begin(asked, number, point)
                return parameters
            super().on_trial_complete(asked)  # Without a result: Optuna counts it as pruned.
            self._on_pruned(point, reason)
        self._gave_up = f"{self._attempts} points in a row could not be tried, the last as {reason}"
        return OptunaSearch.FINISHED

    def save(self, checkpoint_path: str) -> None:
        """Tune's own snapshot of the search stays empty: the study's journal is the record."""
        Path(checkpoint_path).touch()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Progress is of no use to TPE: only final results carry the objective."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells Optuna how a trial ended; one that was cut off counts as failed, not as bad.

        Of a trial that the scheduler stopped its last early score counts, as OptunaSearch has it.
        """
        died = "the trial's process died" if error else ""
        self._same.ended((result or {}).get("failure", died))
        if result is not None and result.get("stage") == ENDED_EARLY:
            result = {**result, self._sweep.objective.metric: result[self._sweep.run.early_metric]}
        scored = result is not None and set(self._sweep.metrics) <= set(result)
        super().on_trial_complete(
            self._asked[trial_id], result if scored else None, error or not scored
        )

    def _judge(self, point: dict[str, Any]) -> tuple[int, dict[str, Any], str]:
        """Which trial of the setting comes next, its parameters; or why none does."""
        if reason := infeasible_reason(self._sweep, point):
            return 0, point, reason
        for number, parameters in enumerate(self._sweep.replicates_of(point)):
            digest = short_digest(self._sweep.trial_config(parameters))
            if (known := self._known.get(digest)) is None:
                self._known[digest] = "being tried"
                return number, parameters, ""
        return 0, point, f"trial {digest} has the same configuration ({known})"

    def _begin(self, asked: str, number: int, point: dict[str, Any]) -> None:
        """Notes which trial of its setting this is, and queues the others if it was not queued."""
        if self._sweep.replicates == 1:
            return
        study, trial = cast(Any, self)._ot_study, self._ot_trials[asked]
        trial.set_user_attr(_REPLICATE, number)
        queued = "fixed_params" in study._storage.get_trial(trial._trial_id).system_attrs
        for _ in range(0 if queued else self._sweep.replicates - 1):
            study.enqueue_trial(point)


def _sampler(sweep: SweepConfig, seed: int, entropy: int) -> optuna.samplers.BaseSampler:
    first = sweep.num_startup_trials
    if sweep.sampler == "random":
        return IndependentSampler(entropy)
    if sweep.sampler == "grid":
        return GridInOrder(sweep)
    if sweep.sampler == "gp":
        return optuna.samplers.GPSampler(
            seed=seed, n_startup_trials=first, deterministic_objective=False
        )
    if sweep.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, first))
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=first, constant_liar=True, multivariate=True
    )


class SameError:
    """Counts the trials in a row that failed with the same error.

    Args:
        limit: how many make it a bug rather than the fault of a point or a machine.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._count, self._last, self.reached = limit, 0, "", ""

    def ended(self, failure: str) -> None:
        """Takes note of a trial that has ended, with `failure` empty if it did not fail."""
        text = re.sub(r"0x[0-9a-f]+|[0-9a-f]{8,}|\d+", "#", failure)  # Sizes, ids and times differ.
        self._count = self._count + 1 if text == self._last else 1
        self._last = text
        if text and self._count >= self._limit:
            self.reached = f"{self._count} trials in a row failed with the same error: {failure}"


class IndependentSampler(optuna.samplers.RandomSampler):
    """Random points of which each is a function of `entropy` and its place in the order alone.

    However often a search is stopped and continued, its points are those that were fixed before
    the first result. Points that are queued anew, after an interruption, take no place.
    """

    def __init__(self, entropy: int) -> None:
        super().__init__()
        self._entropy = entropy

    def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Begins the stream of the next place."""
        earlier = study.get_trials(deepcopy=False)
        place = sum(
            "fixed_params" not in t.system_attrs for t in earlier if t.number < trial.number
        )
        bits = np.random.MT19937(np.random.SeedSequence([self._entropy, place]))
        cast(Any, self)._rng = SimpleNamespace(rng=np.random.RandomState(bits))  # Optuna is pinned.


class GridInOrder(optuna.samplers.GridSampler):
    """Every point of the grid once, in an order that the sweep's configuration alone decides.

    Optuna's own takes any of the points without a result, which depends on when trials end and
    searches restart. Here the order is that of its shuffle, by `search_seed`; but points that the
    budget cannot pay come first, so that they are known, and counted as pruned, from the start.
    Points that are queued anew, after an interruption, are not asked for again.
    """

    def __init__(self, sweep: SweepConfig) -> None:
        choices = {key: list(values or ()) for key, values in sweep.choices.items()}
        super().__init__(choices, seed=sweep.search_seed)
        points = [dict(zip(self._param_names, each, strict=True)) for each in self._all_grids]
        self._order = sorted(
            range(len(points)), key=lambda i: not infeasible_reason(sweep, points[i])
        )

    def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Takes the first point that no earlier trial has taken."""
        if "fixed_params" in trial.system_attrs:
            return
        taken = {
            each.system_attrs["grid_id"]
            for each in study.get_trials(deepcopy=False)
            if "grid_id" in each.system_attrs and set(each.params) == set(self._param_names)
        }
        left = [number for number in self._order if number not in taken]
        # Of a grid without a point left any will do: the search refuses what it knows.
        number = left[0] if left else self._order[0]
        storage, trial_id = study._storage, trial._trial_id  # As Optuna's own: it is pinned.
        storage.set_trial_system_attr(trial_id, "grid_id", number)

    def after_trial(self, *_: Any) -> None:
        """Nothing: Optuna's own ends the study with the grid; here num_trials ends the sweep."""


def _settle(
    sweep: SweepConfig,
    storage: optuna.storages.BaseStorage,
    ended: Mapping[str, Sequence[float] | None],
) -> int:
    """Closes what an earlier driver left open, queues what has no result, counts all trials.

    Where settings have replicates, the first search begins with that of the base run.
    """
    study = optuna.create_study(
        study_name=sweep.name,
        storage=storage,
        load_if_exists=True,
        directions=[objective.direction for objective in sweep.objectives],
    )
    states = optuna.trial.TrialState
    again: dict[str, dict[str, Any]] = {}
    for trial in study.get_trials(deepcopy=False):
        whole = set(trial.params) == set(sweep.search_space)  # Not where a driver died asking.
        of_setting = sweep.replicates_of(trial.params) if whole else []
        digests = [short_digest(sweep.trial_config(each)) for each in of_setting]
        digest = digests[trial.user_attrs.get(_REPLICATE, 0)] if whole else ""
        if trial.state == states.RUNNING:
            if (values := ended.get(digest)) is not None:
                study.tell(trial.number, values)
            else:
                study.tell(trial.number, state=states.FAIL)
        cut = trial.state in (states.RUNNING, states.FAIL)
        for each in digests if trial.state != states.PRUNED else ():
            if each not in ended and (cut or each != digest):  # Itself, or others of its setting.
                again[each] = trial.params
        if trial.state == states.WAITING:
            # Queued anew below, in order; `tell` takes no trial that was never asked for.
            storage.set_trial_state_values(trial._trial_id, states.FAIL)
    inside = all(sweep.search_space[key].holds(value) for key, value in sweep.preset.items())
    if sweep.replicates > 1 and inside and not any(trial.params for trial in study.trials):
        for _ in range(sweep.replicates):
            study.enqueue_trial(sweep.preset)
    for parameters in again.values():
        study.enqueue_trial(parameters)
    return len(study.trials)
