"""A sweep's file and command line: one set of keys, early errors, stable trial ids."""

from pathlib import Path

import pytest

from core.errors import ConfigError
from sweep.config import dump_sweep, load_sweep, trial_id_of

QUICKSTART = Path("sweep/configs/quickstart.yaml")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sweep.yaml"
    base = Path("core/configs/digits.yaml").resolve()
    path.write_text(f"name: t\nbase: {base}\n{text}")
    return path


def test_quickstart_meets_its_promise():
    sweep = load_sweep(QUICKSTART, {})
    assert sweep.num_trials >= 4
    assert sweep.workers_per_trial == 2
    assert set(sweep.search_space) == {
        "central_images.per_class",
        "central_images.noise_multiplier",
        "stage_split",
    }


def test_keys_of_sweep_and_run_stand_side_by_side():
    sweep = load_sweep(
        QUICKSTART,
        {
            "num_trials": 7,
            "objective.metric": "fid_cnn",
            "objective.direction": "minimize",
            "training.num_steps": 40,
            "search_space.stage_split.high": 0.5,
            "search_space.private_training.learning_rate.low": 1e-4,
            "search_space.private_training.learning_rate.high": 1e-2,
        },
    )
    assert sweep.num_trials == 7
    assert sweep.objective.metric == "fid_cnn"
    assert sweep.fixed["training.num_steps"] == 40
    assert sweep.search_space["stage_split"].high == 0.5
    assert sweep.search_space["private_training.learning_rate"].low == 1e-4
    config = sweep.trial_config({"stage_split": 0.25})
    assert config.training.num_steps == 40
    assert config.stage_split == 0.25
    assert dump_sweep(sweep)["base"]["training"]["num_steps"] == 40


def test_dotted_and_nested_search_spaces_mean_the_same(tmp_path):
    dotted = "search_space:\n  central_images.per_class:\n    low: 1\n    high: 9\n"
    nested = "search_space:\n  central_images:\n    per_class:\n      low: 1\n      high: 9\n"
    first = load_sweep(written(tmp_path, dotted), {})
    assert load_sweep(written(tmp_path, nested), {}) == first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_trails": 3}, r"unknown key 'num_trails'; did you mean 'num_trials'"),
        ({"stage_spilt": 0.1}, r"did you mean 'stage_split'"),
        ({"num_trials": 0}, r"num_trials=0 .*integer in \[1"),
        ({"stage_split": 0.3}, r"'stage_split' stands both in search_space and in fixed"),
        ({"search_space.stage_split.high": 1.5}, r"stage_split=1\.5"),
        ({"search_space.stage_split.low": 0.9}, r"low must not exceed high"),
        ({"search_space.stage_splt.low": 0.9}, r"unknown key 'stage_splt'|either low and high"),
        ({"objective.direction": "minimize"}, r"would search for the worst accuracy"),
        ({"objective.metric": "loss"}, r"'accuracy', 'fid', 'fid_cnn'"),
        ({"name": "../elsewhere"}, r"name="),
        ({"privacy.target_epsilon": -1}, r"privacy\.target_epsilon=-1"),
        ({"base": "nowhere.yaml"}, r"no configuration file at '.*nowhere\.yaml'"),
    ],
)
def test_errors_name_key_and_remedy(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_sweep(QUICKSTART, overrides)


def test_the_same_point_has_the_same_id_and_another_another():
    sweep = load_sweep(QUICKSTART, {})
    first = trial_id_of(sweep.trial_config({"stage_split": 0.25}))
    assert first == trial_id_of(sweep.trial_config({"stage_split": 0.25}))
    assert first != trial_id_of(sweep.trial_config({"stage_split": 0.5}))
