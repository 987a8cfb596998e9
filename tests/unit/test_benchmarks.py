"""The benchmarks run at tiny sizes; no time is asserted."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import variants


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("precision", gpu.DTYPES)
def test_the_gpu_script_runs_and_its_table_is_complete(precision, monkeypatch):
    monkeypatch.setattr(gpu, "DTYPES", {precision: gpu.DTYPES[precision]})
    figures = gpu.measure(dataclasses.replace(gpu.DRY, largest=2))
    assert figures[f"largest_physical_batch_{precision}"] == 2
    assert figures[f"recipe_gpu_hours_{precision}"] > 0
    assert gpu.table(figures).count("failed") == 0
    assert gpu.table(None).count("not measured") == len(gpu.ROWS)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_per_example_gradients_hold_a_kth_of_opacus():
    config = variants.preset("core/configs/digits.yaml", model__base_channels=8)
    batch = variants.make_batch(config, 2, 3)
    held = variants.ours(config, 3)(batch)
    assert variants.opacus(config, 3)(batch) == 3 * held
