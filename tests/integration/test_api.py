"""The public names of Python: thin, light to load, and no way around a check of the command."""

import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from two_ranks import TINY

import core
import sweep
from core.__main__ import main
from core.config import Config, yaml_subset
from core.errors import ConfigError, InfeasibleError
from core.pipeline.single import Outcome
from core.privacy.ledger.ledger import Ledger
from sweep.config.sweep import Objective, require_as_loaded

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "core" / "configs" / "digits.yaml"


def tiny(folder: Path, **changes: object) -> Config:
    where = {"runtime.ledger": str(folder / "ledger")}
    where["runtime.cache"] = os.environ["FETA_SWEEP_TEST_CACHE"]
    return core.load(DIGITS, TINY | where | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("api")
    return folder, core.run(tiny(folder), folder / "mine", verbosity=-1)


def ledger_of(folder: Path) -> str:
    (path,) = (folder / "ledger").glob("*.jsonl")
    return path.read_text()


def test_every_public_name_is_there_and_none_is_hidden_by_a_package():
    for package in (core, sweep):
        inside = {module.name for module in pkgutil.iter_modules(package.__path__)}
        assert not inside & {*package.__all__}
        assert {*package.__all__} == {*package._HOMES}
        assert all(callable(getattr(package, name)) for name in package.__all__)
        with pytest.raises(AttributeError, match="has no attribute 'rum'"):
            _ = package.rum


@pytest.mark.parametrize(
    ("code", "unneeded"),
    [
        ("import core, sweep; from sweep import load_sweep", {"torch", "ray", "pandas"}),
        (f"from core import load, make_plan; make_plan(load('{DIGITS}'))", {"torch"}),
        ("from core import Generator, run", {"ray", "mlflow", "sweep"}),
    ],
)
def test_a_name_loads_only_what_it_uses(code, unneeded):
    code = f"import sys; {code}; print({unneeded} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_run_has_scores_a_folder_and_one_charge(finished):
    folder, outcome = finished
    assert outcome.folder.path == folder / "mine"
    assert outcome.scores.keys() == {"accuracy", "fid_cnn", "kid_cnn"} | {
        f"{name}_cnn" for name in ("precision", "recall")
    }
    plan = core.make_plan(tiny(folder))
    assert outcome.folder.plan() == plan
    assert outcome.report["epsilon"] == plan.epsilon <= 1
    (path,) = (folder / "ledger").glob("*.jsonl")
    assert Ledger.at(path).epsilon_of_run("mine") == pytest.approx(plan.epsilon, rel=1e-3)
    charged = ledger_of(folder)
    again = core.run(tiny(folder), str(folder / "mine"), verbosity=-1)
    assert again.report == outcome.report
    assert ledger_of(folder) == charged


def test_the_command_goes_on_with_the_same_folder_and_charges_nothing(finished, capsys):
    folder, outcome = finished
    charged = ledger_of(folder)
    pairs = [f"{key}={value}" for key, value in TINY.items()]
    pairs += [f"runtime.ledger={folder}/ledger"]
    pairs += [f"runtime.cache={os.environ['FETA_SWEEP_TEST_CACHE']}"]
    run_dir = str(outcome.folder.path)
    assert main(["run", "-q", "--config", str(DIGITS), "--run-dir", run_dir, *pairs]) == 0
    assert f"{outcome.scores['accuracy']:.4g}" in capsys.readouterr().out
    assert ledger_of(folder) == charged


def test_a_run_and_its_bundle_draw_what_it_was_scored_with(finished, tmp_path):
    _, outcome = finished
    run_dir, bundle = outcome.folder.path, tmp_path / "bundle"
    assert main(["release", "--run-dir", str(run_dir), "--out", str(bundle)]) == 0
    with np.load(outcome.folder.images) as stored:
        for folder in (run_dir, str(bundle)):
            drawn = core.Generator.load(folder).draw(40)
            assert drawn.images.dtype.is_floating_point is False
            assert np.array_equal(drawn.images.numpy(), stored["images"])
            assert np.array_equal(drawn.labels.numpy(), stored["labels"])
    other = core.Generator.load(bundle, {"seed": 7}).draw(40)
    assert not np.array_equal(other.images.numpy(), drawn.images.numpy())
    with pytest.raises(ConfigError, match="num_images=0 must be at least 1"):
        core.Generator.load(bundle).draw(0)
    (bundle / "grid.png").write_bytes(b"x")
    with pytest.raises(ConfigError, match="not the bundle as released"):
        core.Generator.load(bundle)
    with pytest.raises(ConfigError, match=r"no finished run .* and no released bundle"):
        core.Generator.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"privacy.scope": "selection", "privacy.dp_accuracy_stddev": 50},
            ConfigError,
            "one run alone is no search",
        ),
        (
            {"privacy.scope": "tune_then_train", "privacy.dp_accuracy_stddev": 50},
            ConfigError,
            "one run alone is no search",
        ),
        ({"central_images.per_class": 4000}, InfeasibleError, "the central images alone spend"),
    ],
)
def test_what_the_command_refuses_is_refused_and_nothing_is_claimed(
    tmp_path, settings, error, message
):
    config = tiny(tmp_path, **settings)
    with pytest.raises(error, match=message):
        core.run(config, tmp_path / "run", verbosity=-1)
    assert not list(tmp_path.glob("ledger/*"))
    assert not list(tmp_path.glob("run/charged/*"))


def test_a_configuration_that_was_changed_by_hand_is_checked_again(tmp_path):
    config = tiny(tmp_path)
    loose = config.privacy.model_copy(update={"target_delta": 0.5})
    with pytest.raises(ConfigError, match=r"privacy\.target_delta=0\.5 must lie in"):
        core.run(config.model_copy(update={"privacy": loose}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_configuration_in_the_same_folder_is_refused(finished, tmp_path):
    folder, outcome = finished
    own = Path(shutil.copytree(outcome.folder.path, tmp_path / "mine"))
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        core.run(tiny(folder, **{"privacy.target_epsilon": 2.0}), own, verbosity=-1)


def test_a_sweep_is_read_from_a_mapping_as_from_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"name": "s", "base": str(DIGITS), "search_space": {"stage_split": {"low": 0.2}}}
    (tmp_path / "s.yaml").write_text(yaml_subset.dump(content))
    more = {"search_space.stage_split.high": 0.6, "privacy.target_epsilon": 3.0}
    found = sweep.load_sweep(content, more)
    assert found == sweep.load_sweep(tmp_path / "s.yaml", more)
    assert found.run == core.load(DIGITS, {"privacy.target_epsilon": 3.0})
    with pytest.raises(ConfigError, match="this mapping is no sweep"):
        sweep.load_sweep({"name": "s"})
    with pytest.raises(ConfigError, match=r"unknown key 'privacy\.target_epsilom'"):
        sweep.load_sweep(content, {**more, "privacy.target_epsilom": 1})


@pytest.mark.parametrize(
    ("scope", "changes", "message"),
    [
        ("sweep", {"objective": Objective(metric="accuracy")}, "objective.metric='accuracy'"),
        ("selection", {"sampler": "tpe"}, "sampler='tpe'"),
        ("tune_then_train", {"final": {}}, "was changed after it was loaded"),
    ],
)
def test_a_sweep_that_was_changed_by_hand_is_refused_before_anything_is_claimed(
    scope, changes, message, tmp_path
):
    content = {"name": "s", "base": str(DIGITS), "sampler": "random", "objective": "dp_accuracy"}
    content["search_space"] = {"stage_split": {"low": 0.2, "high": 0.6}}
    more = TINY | {"privacy.scope": scope, "privacy.dp_accuracy_stddev": 50}
    more |= {"storage_path": str(tmp_path / "runs"), "num_trials": 2}
    if scope == "selection":
        more |= {"num_trials": None, "privacy.selection_law": "geometric"}
    if scope == "tune_then_train":
        more |= {"privacy.tuning_epsilon": 0.2, "privacy.tuning_steps": 0.5, "dataset.public": True}
        more |= {"central_images.noise_multiplier": 60, "privacy.dp_accuracy_stddev": None}
        content["objective"] = "accuracy"
    config = sweep.load_sweep(content, more)
    require_as_loaded(config)
    with pytest.raises(ConfigError, match=message):
        sweep.run_sweep(config.model_copy(update=changes))
    assert not (tmp_path / "runs").exists()
