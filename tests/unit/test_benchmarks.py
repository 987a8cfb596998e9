"""The benchmarks run at tiny sizes; no time is asserted."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from pretended_gpu import pretended_gpu

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ablations
import gpu
import methods
import variants

ALONE = """
import runpy, sys
from importlib.machinery import PathFinder
ABSENT = {"dp_accounting", "torchvision", "sklearn", "PIL", "pytorch_fid", "ray", "mlflow",
          "optuna", "rich", "psutil"}
class Found(PathFinder):
    def find_spec(name, path=None, target=None):
        return None if name in ABSENT else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Found
sys.argv = ["gpu.py", "--dry-run"]
runpy.run_path("tests/benchmarks/gpu.py", run_name="__main__")
"""


def test_the_gpu_script_runs_and_its_table_is_complete():
    """With the packages that it names alone."""
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=variants.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a dry run: the figures mean nothing\nfloat32: convolutions in ")
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line]
    assert [row[0] for row in rows[2:]] == [text for text, _, _ in gpu.ROWS]
    assert all(float(value) > 0 for row in rows[2:] for value in row[1:])
    assert gpu.table(None).count("not measured") == len(gpu.ROWS) * len(gpu.DTYPES)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_gpu_script_measures_a_whole_run_on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "DTYPES", {"bfloat16": torch.bfloat16})
    broken = RuntimeError("CUDA error: invalid configuration argument")
    monkeypatch.setattr(variants, "opacus", Mock(side_effect=broken))
    with pretended_gpu():
        figures = gpu.measure(dataclasses.replace(gpu.DRY, device="cuda"))
    json.dumps(figures)
    assert figures["device"] == "pretended"
    parts = [
        figures[f"{part}_hours_bfloat16"] for part in ("warm_up", "private", "sampling", "scores")
    ]
    assert min(parts) > 0
    assert figures["hours_bfloat16"] == pytest.approx(sum(parts))
    assert figures["opacus_reason_bfloat16"] == f"RuntimeError: {broken}"
    assert "opacus_seconds_bfloat16" not in figures  # The rest is measured all the same.
    assert figures["opacus_ghost_seconds_bfloat16"] > 0
    text = gpu.table(figures)
    assert text.count("failed") == 2
    assert "| Opacus (hooks), ms | failed |" in text


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_per_example_gradients_hold_a_kth_of_opacus():
    config = variants.preset("core/configs/digits.yaml", model__base_channels=8)
    batch = variants.make_batch(config, 2, 3)
    held = variants.ours(config, 3)(batch)
    assert variants.opacus(config, 3)(batch) == 3 * held


def test_ablations_differ_from_the_base_and_their_table_compares_equal_seeds():
    base = ablations.load(ablations.PRESET, ablations.SHORT)
    configs = [ablations.load(ablations.nested(base), c) for c in ablations.VARIANTS.values()]
    assert len({ablations.digest_of(config) for config in configs}) == len(configs)
    figures = {"fid_cnn": 9.0, "epsilon": 10.0, "noise_multiplier": 1.0, "central_stddev": None}
    rows = [
        {"name": name, "seed": seed, "accuracy": accuracy, "seconds": 1.0, **figures}
        for name, seed, accuracy in (("base", 0, 0.6), ("base", 1, 0.7), ("other", 1, 0.75))
    ]
    text = ablations.table(rows)
    assert "| other | 75.0% | +5.0 | 9.00 | +0.00 | 10.000 | 1.0000 | - | 1 | 1 |" in text
    assert "spreads by 10.0 points" in text


def test_the_table_of_methods_has_means_and_intervals_over_seeds():
    figures = {"steps": 400, "seconds": 120.0, "fid_cnn": 16.0, "recall_cnn": 0.1}
    names = {"dataset": "mnist", "epsilon": 10.0, "method": "dpdm"}
    rows = [
        names | figures | {"seed": seed, "accuracy": accuracy, "precision_cnn": accuracy}
        for seed, accuracy in enumerate((0.7, 0.8, 0.9))
    ]
    # Student's t of two degrees of freedom: 4.303 * 0.1 / sqrt(3).
    line = "| mnist | 10 | dpdm | 400 | 2.0 | 80.0 ± 24.8 | 16.0 ± 0.0 |"
    assert line in methods.table(rows)
    assert "| 70.0 | 16.0 | 0.70 | 0.10 | 1 |" in methods.table(rows[:1])


def test_each_method_has_its_preset_at_each_epsilon():
    found = {
        (name, epsilon): methods.config_of("fashion_mnist", epsilon, name, 0.5, {})
        for name in methods.METHODS
        for epsilon in (1.0, 10.0)
    }
    assert len({methods.digest_of(config) for config in found.values()}) == len(found)
    for (name, epsilon), config in found.items():
        plan = methods.make_plan(config)
        assert 0.98 * epsilon < plan.epsilon <= epsilon
        assert (plan.dp_sgd.num_steps == 0) == (name in methods.UNTRAINED)


def test_rdp_asks_for_more_noise_than_the_plan():
    plan = ablations.make_plan(
        ablations.load({}, {"privacy.target_epsilon": 1.0, "stage_split": 0.0})
    )
    assert 1.01 < ablations.noise_by_rdp(plan) / plan.noise_multiplier < 1.3
    assert ablations.rdp_changes(plan)["privacy.target_epsilon"] < 0.99 * plan.target_epsilon
