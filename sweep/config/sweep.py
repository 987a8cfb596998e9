"""Configuration of a sweep: a base run, what is fixed, what is searched, and the objective.

On the command line and in the file, keys of the sweep and dotted keys of the run stand side by
side; a key that is not the sweep's own is a key of the run and holds for every trial.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from core.config import (
    Config,
    Positive,
    PositiveInt,
    Section,
    default_ledger,
    flatten,
    load,
    load_yaml,
    merge,
    nested,
    validate,
)
from core.config.keys import CLUSTERS, COUNT, known_keys, nearest_key
from core.config.metrics import DIRECTIONS
from core.errors import ConfigError
from sweep.config.address import known_address, own_folder
from sweep.config.dimension import Dimension
from sweep.config.grid import PublishedGrid, check_grid, default_num_trials
from sweep.config.prices import Cloud
from sweep.config.scope import (
    SEED,
    STEPS,
    Search,
    check_limits,
    check_searched,
    scope_settings,
    tuning_settings,
)

_FOLDERS = ("runtime.ledger", "runtime.cache")
_SECTIONS = ("fixed", "search_space", "final")


class Objective(Section):
    """What makes a trial the best one."""

    metric: Literal[
        "accuracy", "dp_accuracy", "fid", "fid_cnn", "kid", "kid_cnn",
        "precision", "precision_cnn", "recall", "recall_cnn",
    ] = "accuracy"  # fmt: skip
    direction: Literal["maximize", "minimize"] = "maximize"
    """If it is not given, that in which the metric improves."""

    @property
    def mode(self) -> Literal["max", "min"]:
        """The direction in Tune's terms."""
        return "max" if self.direction == "maximize" else "min"

    def gain(self, scores: Mapping[str, float]) -> float:
        """The score, of which more is better."""
        return scores[self.metric] if self.direction == "maximize" else -scores[self.metric]

    @model_validator(mode="before")
    @classmethod
    def _improving(cls, content: Any) -> Any:
        content = {"metric": content} if isinstance(content, str) else content
        if not isinstance(content, Mapping):
            return content
        metric = content.get("metric", "accuracy")
        known = isinstance(metric, str) and metric in DIRECTIONS
        return {"direction": DIRECTIONS[metric], **content} if known else content

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.direction != DIRECTIONS[self.metric]:
            raise ValueError(
                f"objective.direction={self.direction!r} would search for the worst "
                f"{self.metric}: set it to {DIRECTIONS[self.metric]!r}"
            )
        return self


class AshaConfig(Section):
    """Asynchronous successive halving (Li et al. 2020)."""

    grace_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the steps after which a trial is judged first."""
    reduction_factor: Annotated[float, Field(ge=1.5, le=16)] = 2.0
    """A trial goes on if it is among the best 1/factor so far; the next judgement comes after
    `factor` times as many steps."""

    @property
    def rungs(self) -> tuple[float, ...]:
        """Shares of the steps after which trials are judged."""
        shares: list[float] = []
        while (share := self.grace_fraction * self.reduction_factor ** len(shares)) < 1:
            shares.append(share)
        return tuple(shares)


class SweepConfig(Section):
    """A sweep, complete."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")]
    """Also the folder below `storage_path`, the MLflow parent run, and how a sweep is resumed."""
    base: str | dict[str, Any]
    """YAML file of the run, relative to the sweep's own file, or the content of one."""
    fixed: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Dotted keys of the run with values that hold for every trial."""
    search_space: dict[str, Dimension]
    """Dotted numeric (or, with `choices`, any) keys of the run."""
    objective: Objective = Objective()
    """One, or a list, of which the front of trials that no other beats in all is sought."""
    further_objectives: tuple[Objective, ...] = ()
    """All but the first of a list given as `objective`."""
    sampler: Literal["tpe", "gp", "nsga2", "random", "grid"] = "tpe"
    """TPE (Bergstra et al. 2011), a Gaussian process that takes scores for noisy (log expected
    improvement, Ament et al. 2023) and NSGA-II (Deb et al. 2002) learn from results; random draws
    alike and independently; grid takes every combination of the choices once."""
    replicates: PositiveInt = 1
    """Trials of each setting, which differ in seed and noise; each is charged, and is one of
    `num_trials`. From 2 on the noise of the scores is estimated, and the base run's own setting
    comes first where the search space holds it."""
    published: PublishedGrid | None = None
    """Figures over the same two keys, drawn beside those of the sweep in its report."""
    scheduler: Literal["none", "asha"] = "none"
    """`asha` stops trials that score poorly during training."""
    asha: AshaConfig = AshaConfig()
    final: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Scope `public`: dotted keys that turn the best trial into the one run on sensitive data.
    Under scope `tune_then_train` the sweep sets them."""
    num_trials: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """8 if not given, of a grid all points that the budget can pay; without a final run. Under
    scope `selection` drawn secretly, and never given."""
    workers_per_trial: PositiveInt = 2
    min_workers_per_trial: PositiveInt | None = None
    """Given, a trial that lost workers goes on with as few as this, and with more when it can."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0, le=1)] = 0.0
    """One, a part that workers share, or none: then trials compute on CPUs. If it is not given,
    what this machine has for each; none on a cluster, whose nodes may come with the trials."""
    max_concurrent_trials: PositiveInt | None = None
    """None: as many as the cluster has room for when the sweep starts; where an autoscaler adds
    workers, as many as the head holds."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts of a trial whose worker died; each goes on from the last checkpoint."""
    max_preemptions: Annotated[int, Field(ge=0)] = 20
    """The same, where the cloud had said that it takes the worker's machine away."""
    max_wait: Positive = 30.0
    """Minutes in which every trial may wait for workers and no machine comes; then it stops."""
    max_same_error: PositiveInt = 3
    """Trials in a row that may fail with the same error before the sweep stops."""
    max_hours: Positive | None = None
    """Device hours (of GPUs, or of CPU cores without any) that all trials may use together,
    interrupted and failed ones and earlier starts of the sweep included; then it stops. A trial
    that waits for workers uses none."""
    max_gpu_hours: Positive | None = None
    """The same, where it must be GPUs."""
    max_cost: Positive | None = None
    """USD of all machines of the cluster, idle and starting ones included, by
    `clusters/prices.yaml` at the prices on demand of `cloud`."""
    cloud: Cloud | None = None
    search_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    num_startup_trials: PositiveInt = 10
    """Random trials before TPE or the Gaussian process starts to model the results."""
    experiment: Annotated[str, Field(pattern=r"^.{1,500}$")] = "feta-sweep"
    """MLflow experiment."""
    storage_path: str = "runs"
    """Folder that the driver and all workers see. An address, `s3://BUCKET/FOLDER`, `gs://` or
    `abfs://`, becomes `storage_address`, and the path then is a folder of the driver's machine."""
    storage_address: str | None = None
    """Where folders of each machine's own are kept; an address as `storage_path` sets it."""

    @model_validator(mode="before")
    @classmethod
    def _objectives(cls, content: Any) -> Any:
        """A list under `objective` becomes the first and the further ones; words are metrics."""
        given = content.get("objective", {})
        if isinstance(given, Mapping):
            return content
        objectives = list(given) if isinstance(given, (list, tuple)) else [given]
        for each in objectives or [given]:
            metric = each.get("metric") if isinstance(each, Mapping) else each
            if not isinstance(metric, str) or metric not in DIRECTIONS:
                raise ValueError(
                    f"objective={metric!r} is none of {', '.join(DIRECTIONS)}: name one, or "
                    "several as [fid_cnn,accuracy]"
                )
        first, *further = objectives
        content = {**content, "objective": first}
        return {**content, "further_objectives": further} if further else content

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        keys = known_keys(Config)
        metrics = [objective.metric for objective in self.objectives]
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"objective={metrics} names a metric twice")
        for key, dimension in self.search_space.items():
            if key not in keys:
                raise ValueError(f"search_space: unknown key '{key}'{nearest_key(keys, key)}")
            if key in self.fixed:
                raise ValueError(f"'{key}' stands both in search_space and in fixed: remove one")
            dimension.check(f"search_space.{key}", keys[key])
        if not self.search_space:
            raise ValueError("search_space is empty: name at least one key to search")
        check_grid(self.sampler, self.choices, self.num_trials, self.published)
        if self.replicates > 1 and (self.sampler == "grid" or self.scheduler != "none"):
            raise ValueError(
                f"replicates={self.replicates} cannot be had with sampler={self.sampler!r} and "
                f"scheduler={self.scheduler!r}: a grid takes replicates as search_space.seed."
                "choices, and the mean of trials that were not stopped is biased, so set "
                "scheduler=none"
            )
        for key in ("max_gpu_hours", "max_cost"):
            if getattr(self, key) is not None and not self.gpus_per_worker:
                raise ValueError(
                    f"{key}={getattr(self, key):g} counts GPUs, but gpus_per_worker=0: set that, "
                    "or limit device hours with max_hours"
                )
        if self.max_cost is not None and self.cloud is None:
            raise ValueError(f"max_cost={self.max_cost:g} needs prices: set cloud to aws or gcp")
        least = self.min_workers_per_trial
        if least is not None and least > self.workers_per_trial:
            raise ValueError(
                f"min_workers_per_trial={least} exceeds workers_per_trial="
                f"{self.workers_per_trial}: lower it"
            )
        return self

    @property
    def num_workers(self) -> int | tuple[int, int]:
        """Workers of a trial as Ray Train wants them: a number, or the least and the most."""
        least = self.min_workers_per_trial
        return self.workers_per_trial if least is None else (least, self.workers_per_trial)

    def trial_config(self, parameters: Mapping[str, Any]) -> Config:
        """The run's configuration at a point of the search space.

        Args:
            parameters: value by dotted key.

        Raises:
            ConfigError: the point is not a valid configuration.
        """
        config = load(self.base, {**self.fixed, **parameters})
        if config.method == "non_private":
            raise ConfigError(
                "method='non_private' has no epsilon that a sweep could state or compose: run it "
                "alone, by python -m core run"
            )
        here = Path(self.storage_path).parent  # Ray gives its workers another directory.
        leaves = flatten(config)
        places = {key: str(here / leaves[key]) for key in _FOLDERS}
        if self.storage_address:  # Each machine has its own.
            del places["runtime.cache"]
        if not self.gpus_per_worker:  # Ray hides no GPU from those who asked for none.
            if config.runtime.device == "cuda":
                raise ConfigError(
                    "runtime.device='cuda' needs GPUs, but gpus_per_worker=0: set that to 1, or to "
                    "less where workers share a GPU"
                )
            places["runtime.device"] = "cpu"
        return load(nested(config), places)

    @property
    def choices(self) -> dict[str, tuple[Any, ...] | None]:
        """Values of the search space by dotted key; None for an interval."""
        return {key: dimension.choices for key, dimension in self.search_space.items()}

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """All objectives; the first decides where one trial must be named."""
        return (self.objective, *self.further_objectives)

    @property
    def metrics(self) -> list[str]:
        """Metrics of the objectives."""
        return [objective.metric for objective in self.objectives]

    @property
    def run(self) -> Config:
        """What all trials share: the base run with all that is fixed."""
        return load(self.base, self.fixed)

    def replicates_of(self, point: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Parameters of the trials of one setting."""
        if self.replicates == 1:
            return [dict(point)]
        first = self.run.seed
        return [{**point, SEED: first + number} for number in range(self.replicates)]

    @property
    def preset(self) -> dict[str, Any]:
        """The base run's own values of the searched keys, seed aside."""
        values = flatten(self.run)
        return {key: values[key] for key in self.search_space if key != SEED}

    @property
    def count_key(self) -> str:
        """Key of how many central images a class has, or clusters where those are searched."""
        return CLUSTERS if CLUSTERS in self.search_space else COUNT

    @property
    def folder(self) -> Path:
        """Where everything of this sweep lies."""
        return Path(self.storage_path) / self.name


def load_sweep(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> SweepConfig:
    """Builds the configuration of a sweep from a YAML file or mapping and dotted overrides.

    Args:
        source: path of a sweep's file, or its content, where `base` is the content of a run's file
            or a path of one from the working directory.
        overrides: flat mapping from key to value; wins over `source`. What is no key of a sweep
            goes to every trial's run.

    Raises:
        ConfigError: names the key, its allowed range and the nearest valid name.
    """
    is_file = isinstance(source, (str, Path))
    content = load_yaml(source) if is_file else dict(source)
    if not {"base", "search_space"} & set(content):
        raise ConfigError(
            f"{repr(str(source)) if is_file else 'this mapping'} is no sweep, as it has neither "
            "base nor search_space: name a file such as sweep/configs/quickstart.yaml, or train "
            "alone by python -m core run --config"
        )
    for key in _SECTIONS:
        if not isinstance(content.get(key) or {}, Mapping):
            raise ConfigError(f"{key}={content[key]!r} must be a section of dotted keys")
    content["fixed"] = flat(content.get("fixed") or {})
    content["final"] = flat(content.get("final") or {})
    content["search_space"] = _dimensions(content.get("search_space") or {})
    content, fixed = _overridden(content, overrides or {})
    content["fixed"] = {**content["fixed"], **fixed}
    if isinstance(content.get("base"), str):
        # Read at once: a submitted job's files may be gone when its last line is printed.
        folder = Path(source).parent if is_file else Path()
        content["base"] = nested(load((folder / content["base"]).resolve()))
    if "gpus_per_worker" not in content:
        content["gpus_per_worker"] = _gpus_of_a_worker(content)
    sweep = validate(SweepConfig, content)
    if sweep.storage_address is not None:
        raise ConfigError("storage_address is no key of a file: give it as storage_path")
    if "://" in sweep.storage_path:
        address = known_address(sweep.storage_path)
        places = {"storage_path": str(own_folder(address)), "storage_address": address}
        sweep = sweep.model_copy(update=places)
    # Absolute, as Ray gives trials and workers another working directory.
    storage = Path(sweep.storage_path).expanduser().absolute()
    sweep = sweep.model_copy(update={"storage_path": str(storage)})
    _check_run(sweep, fixed)
    sweep = sweep.model_copy(update={"fixed": {**sweep.fixed, **_ledger_places(sweep)}})
    _check_places(sweep)
    sweep = _scoped(sweep)
    _check_run(sweep, {})
    return sweep


def _ledger_places(sweep: SweepConfig) -> dict[str, str]:
    """Where the ledgers lie, if nothing is said: where they outlast a head.

    Raises:
        ConfigError: they would not, or something else that must be would not be kept.
    """
    runtime, address, places = sweep.run.runtime, sweep.storage_address, dict[str, str]()
    is_default = runtime.ledger == default_ledger()
    if os.environ.get("RAY_ADDRESS") and is_default:
        places["runtime.ledger"] = str(Path(sweep.storage_path) / "ledger")
    if address is None:
        return places
    if sweep.run.evaluation.epoch_chosen_on == "dp" and sweep.workers_per_trial > 1:
        raise ConfigError(
            f"storage_path={address!r} keeps what the first worker draws, but with "
            "evaluation.epoch_chosen_on='dp' every worker draws private scores: set "
            "workers_per_trial=1, or name a folder that all machines see"
        )
    if runtime.ledger_copy is None:
        if address.startswith("s3://"):
            places["runtime.ledger_copy"] = f"{address}/ledger"
        elif is_default:
            raise ConfigError(
                f"storage_path={address!r} cannot hold the copy of the ledgers, which takes S3: "
                "set runtime.ledger_copy=s3://BUCKET/FOLDER, or runtime.ledger to a folder on a "
                "disk that outlasts the head"
            )
    return places


def _overridden(
    content: dict[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content with the sweep's own overrides, and those that are keys of the run."""
    fixed: dict[str, Any] = {}
    own = {*known_keys(SweepConfig), *SweepConfig.model_fields}  # `sampler`, not `sampler.name`.
    for key, value in overrides.items():
        top, _, rest = key.partition(".")
        if top == "search_space":
            name, _, attribute = rest.rpartition(".")
            if not name or attribute not in Dimension.model_fields:
                raise ConfigError(
                    f"{key}={value!r} is no part of a search space: give search_space.KEY.low and "
                    "search_space.KEY.high, or search_space.KEY.choices, for a KEY of the run"
                )
            content[top].setdefault(name, {})[attribute] = value
        elif key in _SECTIONS:
            raise ConfigError(f"{key}={value!r} is a section: give its dotted keys one by one")
        elif top == "final" and rest:
            content["final"][rest] = value
        elif key in own and top not in _SECTIONS:
            content = merge(content, {key: value})
        else:
            fixed[key] = value
    return content, fixed


def _gpus_of_a_worker(content: Mapping[str, Any]) -> float:
    """What this machine offers each worker of a trial, at most one."""
    import pynvml

    base = content.get("base")
    settings = {**(flat(base) if isinstance(base, Mapping) else {}), **content["fixed"]}
    if os.environ.get("RAY_ADDRESS") or settings.get("runtime.device") == "cpu":
        return 0.0
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:  # There is no driver.
        return 0.0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = min(count, len(visible.split(",")) if visible else 0)
    workers = content.get("workers_per_trial", 2)
    if not count or not isinstance(workers, int):  # No number: refused where it is validated.
        return 0.0
    return 1 / max(1, -(-workers // count))  # As many share a GPU.


def _check_places(sweep: SweepConfig) -> None:
    """Refuses names that Ray and MLflow cannot take, and a folder that holds something else."""
    own = {key: value for key, value in flat(dump_sweep(sweep)).items() if isinstance(value, str)}
    for key, value in own.items():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{key.removeprefix('base.')}={value!r} is not text in UTF-8, as Ray and MLflow "
                "need it: rename it"
            ) from None
    taken = {sweep.folder.parent / name for name in ("mlflow.db", "mlartifacts", "ledger")}
    config = sweep.trial_config({})
    taken |= {Path(config.runtime.ledger), Path(config.runtime.cache)}
    if sweep.folder in taken:
        raise ConfigError(
            f"name={sweep.name!r}: '{sweep.folder}' holds something else: choose another name"
        )


def dump_sweep(sweep: SweepConfig) -> dict[str, Any]:
    """The resolved sweep as plain nested data, with every value of the base run."""
    return {**sweep.model_dump(mode="json"), "base": nested(sweep.run)}


def _scoped(sweep: SweepConfig) -> SweepConfig:
    """The sweep with what its scope decides for every trial.

    Raises:
        ConfigError: the claim of the scope would be false for this search.
    """
    base = sweep.run
    total = default_num_trials(sweep.sampler, sweep.choices)
    extremes = {key: dimension.extremes for key, dimension in sweep.search_space.items()}
    search = Search(
        sweep.metrics, sweep.sampler, sweep.scheduler, sweep.asha.rungs, total, extremes
    )
    settings = scope_settings(base, search, sweep.num_trials, sweep.final)
    check_searched(base, list(sweep.search_space))
    check_limits(base, {k: getattr(sweep, k) for k in ("max_hours", "max_gpu_hours", "max_cost")})
    for key, value in settings.items():
        if sweep.fixed.get(key, value) != value:
            raise ConfigError(
                f"{key}={sweep.fixed[key]} contradicts sampler={sweep.sampler!r} with scheduler="
                f"{sweep.scheduler!r}, which need {value}: leave it out"
            )
    space = dict(sweep.search_space)
    if base.privacy.covers.is_secret:
        if SEED in {*space, *sweep.fixed}:
            raise ConfigError(
                "seed cannot be fixed or searched under privacy.scope='selection', where each "
                "trial draws its own: leave it out"
            )
        space[SEED] = Dimension(low=0, high=2**31 - 1)
    if sweep.replicates > 1 and SEED in space:
        raise ConfigError(
            f"replicates={sweep.replicates} are trials of one setting that differ in seed, which "
            "is itself searched or drawn here: set replicates=1"
        )
    tuning, final = tuning_settings(base, space)
    return sweep.model_copy(
        update={
            "fixed": {**sweep.fixed, **settings, **tuning},
            "search_space": space,
            "final": sweep.final | final,
        }
    )


def require_as_loaded(sweep: SweepConfig) -> None:
    """Refuses a configuration that was changed after `load_sweep`, which checks its scope.

    Raises:
        ConfigError: the claim of the scope would be false, or is not what was resolved.
    """
    covers = sweep.run.privacy.covers
    space = {k: v for k, v in sweep.search_space.items() if not (k == SEED and covers.is_secret)}
    as_given = {"search_space": space}
    if covers.tunes_first:  # Tuning trials have a part of the steps that the final run has.
        steps = {key: value for key, value in sweep.final.items() if key == STEPS}
        as_given |= {"final": {}, "fixed": {**sweep.fixed, **steps}}
    if _scoped(sweep.model_copy(update=as_given)) != sweep:
        raise ConfigError(
            "the sweep was changed after it was loaded, so its scope is not checked: give all "
            "settings to load_sweep"
        )


def _check_run(sweep: SweepConfig, overrides: Mapping[str, Any]) -> None:
    keys = known_keys(Config)
    for key in overrides:
        if key not in keys:
            sweep_keys = set(known_keys(SweepConfig)) - {"fixed", "search_space"}
            raise ConfigError(f"unknown key '{key}'{nearest_key({*keys, *sweep_keys}, key)}")
    start = {key: dimension.extremes[0] for key, dimension in sweep.search_space.items()}
    sweep.trial_config(start)
    for key, dimension in sweep.search_space.items():
        for value in dimension.extremes:
            sweep.trial_config({**start, key: value})


def _dimensions(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and nested sections mean the same in a file."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(value, Mapping) or set(value) & set(Dimension.model_fields):
            found[prefix + key] = dict(value) if isinstance(value, Mapping) else value
        else:
            found.update(_dimensions(value, f"{prefix}{key}."))
    return found


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested mapping under their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves.update(flat(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = value
    return leaves
