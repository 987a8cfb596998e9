"""The benchmarks run at tiny sizes; no time is asserted."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from pretended_gpu import pretended_gpu
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ablations
import cells
import gpu
import methods
import search_pays
import transfer
import variants

from sweep import load_sweep

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


def test_correlations_are_those_of_scipy_and_one_way_or_the_other_where_planted():
    x, y = np.random.default_rng(0).integers(5, size=(2, 7, 18))  # With ties.
    expected = [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert transfer.correlation(x, y) == pytest.approx(expected)
    planted = np.arange(18.0).reshape(3, 3, 2)
    assert transfer.over_settings(planted, planted**3) == (1, 1, 1)
    assert transfer.over_settings(planted, -planted) == (-1, -1, -1)
    assert np.isnan(transfer.correlation(np.ones(3), np.arange(3.0)))


def test_ranks_along_one_key_are_told_from_those_along_the_others():
    """The first key's order turns round, the second's stays, and there is no third effect."""
    first, second, _ = np.meshgrid(np.arange(3), np.arange(3), np.arange(4), indexing="ij")
    noise = np.random.default_rng(0).normal(scale=1e-3, size=(2, *first.shape))
    x, y = 10 * first + second + noise[0], -10 * first + second + noise[1]
    assert transfer.along_key(x, y, 0) == (-1, -1, -1)
    assert transfer.along_key(x, y, 1) == (1, 1, 1)
    _, low, high = transfer.along_key(x, y, 2)
    assert -1 < low < 0 < high < 1
    assert transfer.told((0.1, low, high)).endswith(", no effect")
    assert transfer.told((1, 1, 1)) == "1.00 (1.00 to 1.00)"


def test_intervals_of_correlations_rarely_find_an_effect_in_noise(monkeypatch):
    """At the sizes of the experiment: in 300 draws of a fixed seed."""
    monkeypatch.setattr(transfer, "RESAMPLES", 400)
    sizes = [len(each) for each in transfer.SETTINGS.values()]
    draws = np.random.default_rng(2).normal(size=(300, 2, *sizes))
    ways = (
        transfer.over_settings,
        *(lambda x, y, axis=axis: transfer.along_key(x, y, axis) for axis in range(3)),
    )
    for way in ways:
        outside = [low > 0 or high < 0 for _, low, high in (way(*pair) for pair in draws)]
        assert (
            sum(outside) <= 33
        )  # A rate of 0.065, as was simulated, gives more once in 1,000 tests.


def test_seeds_agree_at_one_epsilon_as_far_as_noise_lets_them():
    scores = np.broadcast_to(np.arange(18.0), (3, 18))
    assert transfer.agreement_of_seeds(scores) == 1
    noise = np.random.default_rng(3).normal(size=(3, 2000))
    assert abs(transfer.agreement_of_seeds(noise)) < 0.1


def options_of(monkeypatch, tmp_path, *more):
    arguments = ["", "--data", "nowhere", "--out", str(tmp_path / "kept.json"), *more]
    monkeypatch.setattr(sys, "argv", arguments)
    return cells.parsed("", "kept.json", 1.0)


def test_the_smallest_epsilon_pays_for_every_setting_and_no_cell_is_named_twice(
    monkeypatch, tmp_path
):
    found = [*transfer.cells_of(options_of(monkeypatch, tmp_path))]
    asked = [json.dumps(row, sort_keys=True) for cell in found for row in cell.asked]
    assert len({*asked}) == len(asked) == 3 * 3 * 18
    least = [cell for cell in found if cell.asked[0]["epsilon"] == min(transfer.EPSILONS)][:2]
    for cell in least:
        sweep = load_sweep(cell.content)
        for point in (cell.asked[0], cell.asked[-1]):  # With the clearest moments, and the others.
            parameters = {key: point[key] for key in sweep.search_space}
            plan = methods.make_plan(sweep.trial_config(parameters))
            assert 0.58 < plan.epsilon <= 0.6


def test_a_cell_of_which_little_time_is_left_is_not_begun(monkeypatch, tmp_path):
    options = options_of(monkeypatch, tmp_path, "--budget", "1")
    found = [*transfer.cells_of(options)]
    assert not cells.run_cells(found, transfer.Rows(options.out), options.end)
    assert not cells.run_cells(found, transfer.Rows(options.out), time.monotonic() - 1)
    assert not [*tmp_path.iterdir()]


def test_searches_spend_what_the_preset_does(monkeypatch, tmp_path):
    found = [*search_pays.cells_of(options_of(monkeypatch, tmp_path, "--seeds", "0"))]
    assert len({cell.content["name"] for cell in found}) == len(found) == 6
    for cell in found:
        (named,) = cell.asked
        sweep = load_sweep(cell.content)
        privacy = sweep.run.privacy
        assert privacy.target_epsilon == named["epsilon"]
        assert (privacy.scope == "trial") == (named["way"] == search_pays.PRESET)
        assert privacy.covers.covers_choice != (named["way"] == search_pays.PRESET)
        high = search_pays.NOISE[named["epsilon"]][1]
        if named["way"] == search_pays.TUNED:
            ends = {key: each.extremes[0] for key, each in sweep.search_space.items()}
            point = ends | {"central_images.noise_multiplier": high}
            methods.make_plan(sweep.trial_config(point))  # Can be paid.


def test_no_effect_is_claimed_where_the_interval_of_a_difference_holds_zero(tmp_path):
    groups = {
        (10.0, way): [
            {"epsilon": 10.0, "way": way, "accuracy": a, "fid_cnn": 9.0 + a, "seconds": 7200.0}
            for a in accuracies
        ]
        for way, accuracies in (
            (search_pays.PRESET, (0.70, 0.71, 0.72)),
            (search_pays.SELECTION, (0.705, 0.71, 0.74)),
            (search_pays.TUNED, (0.80, 0.81, 0.82)),
        )
    }
    told = search_pays.table(groups)
    assert "| 10 | preset | 71.0 ± 2.5 |  | 9.7 ± 0.0 |  | 2.0 ± 0.0 | 3 |" in told
    assert "| +10.0 (+7.7 to +12.3) |" in told
    assert told.count("no effect") == 2  # Of the selection, in both scores.
    search_pays.draw(groups, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
