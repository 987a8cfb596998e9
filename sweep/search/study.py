"""Study of a sweep in Optuna's terms, for the search and, without Ray, for reports."""

from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from sweep.config.dimension import is_integer
from sweep.config.sweep import SweepConfig
from sweep.results.find import JOURNAL

optuna.logging.set_verbosity(optuna.logging.WARNING)


def distributions(sweep: SweepConfig) -> dict[str, BaseDistribution]:
    """The search space in Optuna's terms, by dotted key."""
    space: dict[str, BaseDistribution] = {}
    for key, dimension in sweep.search_space.items():
        if dimension.choices is not None:
            space[key] = CategoricalDistribution(dimension.choices)
            continue
        assert dimension.low is not None
        assert dimension.high is not None
        if is_integer(key):
            step = int(dimension.step or 1)
            space[key] = IntDistribution(
                int(dimension.low), int(dimension.high), log=dimension.log, step=step
            )
        else:
            space[key] = FloatDistribution(
                float(dimension.low), float(dimension.high), log=dimension.log, step=dimension.step
            )
    return space


def open_storage(folder: Path) -> JournalStorage:
    """The study's journal in the sweep's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))


def pruned_points(sweep: SweepConfig) -> list[dict[str, Any]]:
    """Points that were never trained, as the budget could not pay or they were known."""
    if not (sweep.folder / JOURNAL).exists():
        return []
    storage = open_storage(sweep.folder)
    studies = {study.study_name: study for study in storage.get_all_studies()}
    if sweep.name not in studies:
        return []
    study = optuna.load_study(study_name=sweep.name, storage=storage)
    pruned = (optuna.trial.TrialState.PRUNED,)
    return [trial.params for trial in study.get_trials(deepcopy=False, states=pruned)]
