"""Many trials through the real Tune, Optuna journal, ledger and MLflow: no slowdown, leak or flood.

The trials themselves are stand-ins that train nothing, so that the machinery is all there is. Every
call of their storage takes 5 ms. `FETA_SWEEP_SOAK=1000x64` runs 1,000, 64 at a time.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stand_in import stand_in

from core.io.files import write_json

ROOT = Path(__file__).resolve().parents[2]
TRIALS, AT_A_TIME = map(int, os.environ.get("FETA_SWEEP_SOAK", "200x4").split("x"))
WINDOW = TRIALS // 5
MB = 2**20
SWEEP = f"""
name: soak
base: {ROOT}/core/configs/digits.yaml
num_trials: {TRIALS}
workers_per_trial: 1
max_concurrent_trials: {AT_A_TIME}
fixed:
  stage_split: 0.0
  training.num_steps: 4
  privacy.data_set_budget: 500.0
  runtime.ledger: ledger
search_space:
  private_training.learning_rate:
    low: 1e-5
    high: 1e-1
    log: true
  privacy.target_epsilon:
    choices: [0.8, 0.9, 1.0, 1.1, 1.2, 1.3]
"""


def drive(folder: Path) -> None:
    """The driver, in a process of its own, with notes of what it and the ledger's keeper use."""
    import threading

    import psutil

    from sweep.config.sweep import load_sweep
    from sweep.driver.launch import run_sweep

    sweep = load_sweep(folder / "sweep.yaml", {"storage_path": str(folder / "runs")})
    me, notes, over = psutil.Process(), list[dict[str, float]](), threading.Event()
    keeper: list[psutil.Process] = []

    def seconds(process: psutil.Process) -> float:
        return sum(process.cpu_times()[:2])

    def watch() -> None:
        while not over.wait(2.0):
            if not keeper:
                there = me.children(recursive=True)
                keeper.extend(p for p in there if "".join(p.cmdline()).startswith("ray::Keeper"))
            done = len(list((sweep.folder / "trials").glob("*/evaluation.json")))
            note = {"done": done, "rss": me.memory_info().rss, "driver": seconds(me)}
            notes.append({**note, "keeper": seconds(keeper[0]) if keeper else 0.0})

    threading.Thread(target=watch, daemon=True).start()
    outcome = run_sweep(sweep, train=stand_in)
    over.set()
    assert outcome.complete, outcome.stopped
    assert len(outcome.rows) == TRIALS
    write_json(folder / "driver.json", {"notes": notes})


@pytest.fixture(scope="module")
def soaked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("soak")
    (folder / "sweep.yaml").write_text(SWEEP)
    environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI",)}
    here = Path(__file__).parent
    path = [str(each) for each in (here / "spoilt" / "slow", here, ROOT / "tests" / "e2e", ROOT)]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "FETA_SWEEP_SLOW": str(folder / "runs")}
    environment |= {"FETA_SWEEP_SECRET_FILE": str(folder / "secret")}
    code = f"from pathlib import Path; from test_soak import drive; drive(Path({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def workers(folder: Path) -> list[dict[str, Any]]:
    found = (folder / "runs" / "soak" / "trials").glob("*/worker.json")
    return sorted((json.loads(path.read_text()) for path in found), key=lambda each: each["time"])


def size(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.lstat().st_size for each in files)


def driver(folder: Path) -> list[dict[str, float]]:
    """What was noted while trials ran."""
    notes = json.loads((folder / "driver.json").read_text())["notes"]
    return [note for note in notes if WINDOW // 2 <= note["done"] < TRIALS]


def test_late_trials_take_about_as_much_as_early_ones(soaked):
    """By CPU seconds, as what else the machine does must not count."""
    found, last = [], {}
    for each in workers(soaked):
        if each["pid"] in last:
            found.append(each["cpu"] - last[each["pid"]])
        last[each["pid"]] = each["cpu"]
    early, late = (statistics.median(part) for part in (found[5 : 5 + WINDOW], found[-WINDOW:]))
    print(f"\ntrial: {early:.3f} CPU seconds early on, {late:.3f} late")
    assert late / early <= 2


@pytest.mark.parametrize("part", ["driver", "keeper"])
def test_late_trials_take_as_little_of_the_head_as_early_ones(soaked, part):
    notes = driver(soaked)
    half = next(note for note in notes if note["done"] >= TRIALS // 2)

    def each(first: dict[str, float], last: dict[str, float]) -> float:
        return (last[part] - first[part]) / (last["done"] - first["done"])

    early, late = each(notes[0], half), each(half, notes[-1])
    print(f"\n{part}: {early:.3f} CPU seconds a trial in the first half, {late:.3f} in the second")
    assert late / early <= 2


def test_neither_driver_nor_trials_keep_what_they_used(soaked):
    first, *_, last = driver(soaked)
    grown = (last["rss"] - first["rss"]) / (last["done"] - first["done"])
    print(f"\ndriver: {first['rss'] / MB:.0f} MB early on, {last['rss'] / MB:.0f} MB late")
    assert grown <= 0.3 * MB
    for pid in {each["pid"] for each in workers(soaked)}:
        own = [each["rss"] for each in workers(soaked) if each["pid"] == pid]
        if len(own) > 20:
            print(f"trial process: {own[10] / MB:.0f} MB, {own[-1] / MB:.0f} MB")
            assert (own[-1] - own[10]) / len(own) <= 0.3 * MB


def test_a_trial_takes_little_room(soaked):
    runs = soaked / "runs"
    (ledger,) = (soaked / "ledger").glob("*.jsonl")
    parts = {
        "trial folders": runs / "soak" / "trials",
        "Optuna's journal": runs / "soak" / "optuna.journal",
        "Tune's state": runs / "soak" / "ray",
        "ledger": ledger,
        "sweep.log": runs / "soak" / "sweep.log",
        "MLflow's data base": runs / "mlflow.db",
        "MLflow's files": runs / "mlartifacts",
    }
    sizes = {name: size(path) / TRIALS for name, path in parts.items()}
    for name, each in sizes.items():
        print(f"{name}: {each / 1000:.1f} kB a trial")
        assert each > 0
    assert size(runs) / TRIALS <= 150_000
    assert sizes["sweep.log"] <= 5_000
    assert sizes["Optuna's journal"] <= 5_000
    assert sizes["ledger"] <= 5_000
