"""What a sweep uses is counted over all its starts, priced, and bounded; plans say where from."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from core.commands import probe
from core.commands.probe import measure
from core.config import nested, yaml_subset
from core.errors import ConfigError
from core.io.files import write_json
from sweep.config.prices import price_of
from sweep.config.sweep import SweepConfig, load_sweep
from sweep.costs import usage as limits
from sweep.costs.estimate import print_costs, probed_speed, stored_speed
from sweep.costs.usage import WAITING, Machines, Meter, Usage, reached, read_usage
from sweep.results.claim import claim
from sweep.run import main

GPU = {"gpus_per_worker": 1, "workers_per_trial": 2, "cloud": "aws"}
TINY = {
    "training.num_steps": 10,
    "model.base_channels": 8,
    "private_training.expected_batch_size": 16,
    "private_training.noise_multiplicity": 1,
    "sampler.num_steps": 2,
    "evaluation.num_images": 20,
    "runtime.device": "cpu",
    "privacy.target_epsilon": 1.0,
}


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(limits.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def make(tmp_path):
    def make(**overrides: object) -> SweepConfig:
        keys = {key.replace("__", "."): value for key, value in overrides.items()}
        return load_sweep("tests/data/sweep.yaml", {"storage_path": str(tmp_path), **TINY, **keys})

    return make


TRAINS, WAITS = {"stage": "private_training"}, {"stage": WAITING}


def test_use_is_counted_over_restarts_interrupted_trials_and_a_killed_driver(make, clock):
    sweep = make(max_hours=1.0)
    first = Meter(sweep)
    first.started("a", {})
    first.reported("a", WAITS)
    clock.now += 10_000  # No device is held.
    first.reported("a", TRAINS)
    clock.now += 600
    first.reported("b", TRAINS)
    clock.now += 300
    first.died("b")
    first.reported("b", TRAINS)  # Its devices were held.
    first.ended("a", {})
    assert not first.tick()  # Notes that 900 s of a and 300 s of b were used, and nothing more:
    clock.now += 4  # the driver is killed.
    assert read_usage(sweep.folder) == Usage(1200, 2400)
    second = Meter(sweep)
    second.reported("b", TRAINS)
    clock.now += 599
    assert not second.tick()
    second.reported("b", WAITS)  # A worker was lost.
    clock.now += 1000
    second.reported("b", TRAINS)
    assert not second.tick()
    clock.now += 1
    assert second.tick()
    assert second.reason == (
        "max_hours=1 is reached: 1 device hours were used; trials keep their checkpoints, and "
        "the same command with a larger max_hours goes on"
    )
    second.note()
    assert reached(sweep, read_usage(sweep.folder))
    assert not reached(make(max_hours=1.1), read_usage(sweep.folder))
    assert not reached(make(), Usage(1e9, 1e9, 1e9))


def test_machines_are_counted_while_trials_wait_and_those_that_go_until_they_are_gone(make, clock):
    meter = Meter(make(**GPU, max_cost=10.0))
    meter.machines = lambda: Machines(gpus=3, passing=2, plain=1)
    meter.note()
    clock.now += 60
    meter.machines = lambda: None  # The cluster is busy.
    meter.note()
    clock.now += 30
    idle = 60 * price_of("aws").idle
    assert meter.usage() == Usage(0, 0, 3 * 90 + 2 * idle, 90)
    meter.machines = Machines
    meter.note()
    clock.now += 60
    assert meter.usage() == Usage(0, 0, 3 * 90, 90)


def test_money_is_machines_with_gpus_on_demand_and_those_without(make):
    sweep = make(**GPU, max_cost=10.0)
    price = price_of("aws")
    hours = 10.0 / (price.on_demand + price.head / 2)
    usage = Usage(0, 0, hours * 3600, hours * 1800)
    assert usage.cost(sweep) == pytest.approx(10.0)
    assert reached(make(**GPU, max_cost=9.9), usage).startswith("max_cost=9.9 is reached: 10 USD")
    assert not reached(make(**GPU, max_cost=10.1), usage)
    assert "max_gpu_hours=2" in reached(make(**GPU, max_gpu_hours=2.0), Usage(3600, 7200))


def test_use_of_earlier_versions_is_read(make):
    sweep = make(**GPU)
    old = {"trial_seconds": 1.0, "device_seconds": 2.0, "driver_seconds": 3.0}
    write_json(sweep.folder / limits.FILE, old)
    assert read_usage(sweep.folder) == Usage(1.0, 2.0, 2.0, 3.0)


def test_limits_may_change_when_a_sweep_goes_on(make):
    claim(make(max_hours=1.0))
    claim(make(max_hours=2.0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_gpu_hours": 3}, r"max_gpu_hours=3 counts GPUs, but gpus_per_worker=0.*max_hours"),
        ({"max_cost": 5, "gpus_per_worker": 1}, r"max_cost=5 needs prices: set cloud"),
        ({"max_hours": 0}, r"max_hours=0 .*\(0, inf\)"),
        ({"cloud": "ibm"}, r"one of 'aws', 'gcp'"),
        (
            {
                "privacy__scope": "selection",
                "privacy__dp_accuracy_stddev": 50,
                "objective__metric": "dp_accuracy",
                "sampler": "random",
                "num_trials": None,
                "max_hours": 2,
            },
            r"max_hours=2 is not allowed .* secret number of trials",
        ),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(make, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make(**overrides)


def finished_trial(sweep: SweepConfig, name: str, **changes: object) -> Path:
    config = sweep.trial_config({"stage_split": 0.5, **changes})
    folder = Path(sweep.storage_path) / name / "trials" / "abc"
    write_json(folder / "environment.json", {"device": "cpu", "world_size": 2})
    (folder / "config.yaml").write_text(yaml_subset.dump(nested(config)))
    lines = [
        {"step": 5, "stage": "warm_up", "seconds_per_step": 0.5},
        {"step": 6, "stage": "private_training", "seconds_per_step": 9.0},
        {"step": 10, "stage": "private_training", "seconds_per_step": 2.0},
        {"step": 10, "stage": "evaluation"},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "evaluation.json", {"seconds": 20.0})
    return folder


def test_a_stored_figure_is_that_of_the_same_network_and_device(make):
    sweep = make()
    config = sweep.trial_config({"stage_split": 0.2})
    assert stored_speed(sweep, config) is None
    finished_trial(sweep, "other", **{"model.base_channels": 16})
    assert stored_speed(sweep, config) is None
    finished_trial(sweep, "same")
    speed = stored_speed(sweep, config)
    assert speed is not None
    assert (speed.warm_up, speed.private_training, speed.rest) == (0.5, 2.0, 7.5)
    assert "measured in trial same/abc on cpu" in speed.source
    assert speed.of_trial(config) == pytest.approx(2 * 0.5 + 8 * 2.0 + 7.5)
    assert stored_speed(make(workers_per_trial=1), config) is None
    gpu = make(gpus_per_worker=1, runtime__device="auto")
    assert stored_speed(gpu, gpu.trial_config({"stage_split": 0.2})) is None


def test_a_plan_says_what_is_not_measured_and_bounds_what_is(make, capsys):
    def show(sweep: SweepConfig) -> None:
        print_costs(sweep, sweep.trial_config({"stage_split": 0.4}), 4, probe=False)

    show(make())
    assert "device hours: not measured" in capsys.readouterr().out
    gpu = make(**GPU, max_cost=1.0, runtime__device="auto")
    trial = finished_trial(gpu, "same")
    write_json(trial / "environment.json", {"device": "cuda", "world_size": 2})
    write_json(gpu.folder / limits.FILE, asdict(Usage(1800, 3600, 3600, 1800)))
    show(gpu)
    out = capsys.readouterr().out
    assert "seconds: 0.5 a warm-up step, 2 a DP-SGD step, 7.5 the rest of a trial" in out
    price, hours = price_of("aws"), 4 * (4 * 0.5 + 6 * 2 + 7.5) / 3600
    assert f"= {2 * hours:.4g}, without starting" in out
    assert f"{price.of(2 * hours, hours):.4g} on demand" in out
    assert f"{price.of(2 * hours, hours, spot=True):.4g} USD on spot" in out
    assert "5 minutes in which a worker starts and 10 in which it idles, " in out
    assert "60 minutes of the idle head, 0.21 USD; EFS for at most " in out
    assert "used so far: 1 device hours" in out
    assert "at most 1 USD by max_cost, of all machines on demand; that suffices" in out


def test_the_probe_opens_neither_data_nor_secret(make, monkeypatch):
    sweep = make(dataset__name="idx", dataset__path="/nowhere")
    monkeypatch.setenv("FETA_SWEEP_SECRET_FILE", "/nowhere/secret")
    config = sweep.trial_config({"stage_split": 0.5})
    monkeypatch.setattr(probe, "_STEPS", 1)
    found = measure(config, 2)
    assert min(found.warm_up, found.private_training, found.image) > 0
    plain = sweep.trial_config({"stage_split": 0.0})
    assert measure(plain, 1).warm_up == 0
    speed = probed_speed(sweep, config)
    assert "random images" in speed.source
    with pytest.raises(ConfigError, match=r"would measure on cpu, but gpus_per_worker=1"):
        probed_speed(make(gpus_per_worker=1), config)


def test_flags_are_keys_of_the_sweep(capsys):
    config = ["--config", "tests/data/sweep.yaml"]
    assert main([*config, "--plan", "--max-gpu-hours", "3"]) == 2
    assert "max_gpu_hours=3 counts GPUs" in capsys.readouterr().err
    assert main([*config, "--probe"]) == 2
    assert "--probe measures for --plan: give both" in capsys.readouterr().err
