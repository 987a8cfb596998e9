"""Estimate of device hours and money for `--plan`, from measured figures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import Config, flatten
from core.errors import ConfigError
from core.io.files import read_json
from core.record.folder import RunFolder
from sweep.config.prices import CLOUDS, price_of
from sweep.config.sweep import SweepConfig
from sweep.costs.usage import device_name, devices_per_trial, read_usage

_SAME = (
    "model.",
    "dataset.image_size",
    "dataset.channels",
    "warm_up.",
    "private_training.expected_batch_size",
    "private_training.noise_multiplicity",
    "private_training.max_physical_batch_size",
    "training.precision",
    "runtime.channels_last",
)
"""Keys on which the time of a step depends."""


@dataclass(frozen=True)
class Speed:
    """Seconds of a trial's parts.

    Attributes:
        warm_up, private_training: of a step.
        rest: of all else that was measured.
        source: what was measured, and where.
    """

    warm_up: float
    private_training: float
    rest: float
    source: str

    def of_trial(self, config: Config) -> float:
        """Seconds of a whole trial."""
        steps = config.warm_up_steps * self.warm_up + config.private_steps * self.private_training
        return steps + self.rest


def print_costs(sweep: SweepConfig, config: Config, trials: float, probe: bool) -> None:
    """Prints the hours and the price of `trials` trials like `config`, and what the limits allow.

    Args:
        config: of the trial in the middle of the space.
        probe: whether to measure a few steps on random images, if nothing is stored.

    Raises:
        ConfigError: the probe would measure another kind of device than the trials use.
    """
    speed = stored_speed(sweep, config) or (probed_speed(sweep, config) if probe else None)
    devices = f"{devices_per_trial(sweep):g} {device_name(sweep)}s"
    hours = None
    if speed is None:
        print(
            "device hours: not measured (no earlier trial of this network and device in "
            f"'{sweep.storage_path}'; --probe measures a few steps on random images)"
        )
    else:
        seconds = speed.of_trial(config)
        hours = trials * seconds / 3600
        print(
            f"seconds: {speed.warm_up:.4g} a warm-up step, {speed.private_training:.4g} a DP-SGD "
            f"step, {speed.rest:.4g} the rest of a trial ({speed.source})"
        )
        print(
            f"device hours: {trials:g} trials x {devices} x {seconds:.4g} s = "
            f"{hours * devices_per_trial(sweep):.4g}, without starting workers"
        )
    _print_prices(sweep, config, trials, hours)
    _print_limits(sweep, hours)


def _print_prices(
    sweep: SweepConfig, config: Config, trials: float, trial_hours: float | None
) -> None:
    if not sweep.gpus_per_worker:
        print("cost: none known, as the price table holds machines with GPUs")
        return
    from core.pipeline.disk_space import needed_bytes

    stored = trials * needed_bytes(config) / 1e9
    for cloud in (sweep.cloud,) if sweep.cloud else CLOUDS:
        price = price_of(cloud)
        text = f"cost on {cloud}: "
        if trial_hours is not None:
            gpu_hours = trial_hours * devices_per_trial(sweep)
            # One after the other at most: side by side the head runs for less time.
            spot, on_demand = (price.of(gpu_hours, trial_hours, spot) for spot in (True, False))
            text += f"{spot:.4g} USD on spot machines to {on_demand:.4g} on demand; "
        print(
            f"{text}{price.machine} with one GPU {price.spot:g} to {price.on_demand:g} USD an "
            f"hour, head {price.head:g}, with their disks (figures of {price.date})"
        )
        beside = (price.start + price.idle) / 60
        folder = price.folder_month + price.folder_gb_month * stored
        print(
            f"  besides: {price.start:g} minutes in which a worker starts and {price.idle:g} in "
            f"which it idles, {price.of(beside, 0, True):.2g} to {price.of(beside, 0):.2g} USD "
            f"each time; {price.head_idle:g} minutes of the idle head, "
            f"{price.of(0, price.head_idle / 60):.2g} USD; {price.folder} for at most {stored:.2g} "
            f"GB, {folder:.2g} USD a month"
        )


def _print_limits(sweep: SweepConfig, trial_hours: float | None) -> None:
    """The upper bound of what the sweep will use, but for the seconds that stopping takes."""
    usage = read_usage(sweep.folder)
    if usage.device_seconds:
        print(f"used so far: {usage.device_hours:.4g} device hours")
    asked = None if trial_hours is None else trial_hours * devices_per_trial(sweep)
    limits: list[tuple[str, float, float | None]] = []
    for key in ("max_hours", "max_gpu_hours"):
        if (most := getattr(sweep, key)) is not None:
            name = f"device hours by {key}"
            if sweep.cloud and sweep.gpus_per_worker:
                dearest = price_of(sweep.cloud).of(most, most / devices_per_trial(sweep))
                name += f", which cost at most {dearest:.4g} USD"
            limits.append((name, most, asked))
    if sweep.max_cost is not None and sweep.cloud is not None:
        cost = None
        if trial_hours is not None and asked is not None:
            price, workers = price_of(sweep.cloud), devices_per_trial(sweep)
            cost = price.of(asked + workers * (price.start + price.idle) / 60, trial_hours)
        limits.append(("USD by max_cost, of all machines on demand", sweep.max_cost, cost))
    for name, most, estimate in limits:
        text = f"at most {most:g} {name}"
        if estimate is not None:
            text += (
                "; that suffices" if estimate <= most else "; the sweep will stop before its end"
            )
        print(text)


def stored_speed(sweep: SweepConfig, config: Config) -> Speed | None:
    """Figures of the newest finished trial with the same network, batches and kind of device."""
    wanted = _decisive(config)
    for folder in _finished(Path(sweep.storage_path)):
        environment = read_json(folder.environment)
        if environment["world_size"] != sweep.workers_per_trial:
            continue
        if environment["device"] != ("cpu" if config.runtime.device == "cpu" else "cuda"):
            continue
        earlier = folder.config()
        if _decisive(earlier) != wanted:
            continue
        steps = _seconds_per_step(folder)
        if "private_training" not in steps or (config.warm_up_steps and "warm_up" not in steps):
            continue
        warm_up, private = steps.get("warm_up", 0.0), steps["private_training"]
        training = earlier.warm_up_steps * warm_up + earlier.private_steps * private
        result = folder.result()
        assert result is not None
        where = f"{folder.path.parent.parent.name}/{folder.path.name}"
        device = environment.get("device_name", environment["device"])
        # A trial that was resumed counts from its last start: the rest is then not known.
        rest = max(0.0, result.report["seconds"] - training)
        return Speed(warm_up, private, rest, f"measured in trial {where} on {device}")
    return None


def probed_speed(sweep: SweepConfig, config: Config) -> Speed:
    """Figures measured now in this process, on random images.

    Raises:
        ConfigError: the trials use a GPU and this machine has none, or the other way round.
    """
    import torch

    from core.commands.probe import measure
    from core.device import config_device

    device = config_device(config)
    if (device == "cuda") != bool(sweep.gpus_per_worker):
        raise ConfigError(
            f"--probe would measure on {device}, but gpus_per_worker={sweep.gpus_per_worker:g}: "
            "run it on a machine like those of the workers, or correct gpus_per_worker"
        )
    torch.set_num_threads(max(1, int(sweep.cpus_per_worker)))
    found = measure(config, sweep.workers_per_trial)
    drawing = found.image * config.evaluation.num_images / sweep.workers_per_trial
    return Speed(
        found.warm_up,
        found.private_training,
        drawing,
        f"probed on this machine's {device} with random images and one worker's share of a batch; "
        "the rest is drawing images, without scoring them",
    )


def _decisive(config: Config) -> dict[str, Any]:
    return {key: value for key, value in flatten(config).items() if key.startswith(_SAME)}


def _finished(storage: Path) -> list[RunFolder]:
    """Folders of finished trials of all sweeps, the newest first."""
    folders = [RunFolder(path) for path in storage.glob("*/trials/*/")]
    ended = [folder for folder in folders if folder.evaluation.exists()]
    return sorted(ended, key=lambda each: each.evaluation.stat().st_mtime, reverse=True)


def _seconds_per_step(folder: RunFolder) -> dict[str, float]:
    """The last mean of each stage."""
    name = "seconds_per_step"
    return {report["stage"]: report[name] for report in folder.reports() if name in report}
