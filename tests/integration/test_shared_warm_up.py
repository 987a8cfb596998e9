"""Trials with the same central images: one release, charged once, and one warm-up."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from two_ranks import tiny_run

from core.errors import ConfigError
from core.pipeline import released
from core.pipeline.released import Trajectory
from core.privacy.accounting.mechanism import FINE
from core.privacy.accounting.solve import epsilon_of_mechanisms
from core.privacy.ledger.ledger import Ledger
from core.training.checkpoint import Checkpoints
from sweep.config.scope import shares_central_images
from sweep.config.sweep import load_sweep

STEPS = 12
SETTINGS = {
    "training.num_steps": STEPS,
    "runtime.log_every": 1,
    "central_images.per_class": 5,  # So dear that counting them twice shows.
    "central_images.noise_multiplier": 2.5,
}


def trial(sweep: Path, name: str, split: float, **changes: object) -> list[dict]:
    """A trial of a sweep, whose trials share a ledger and the folder `shared`."""
    settings = SETTINGS | {"runtime.ledger": str(sweep / "ledger"), "stage_split": split} | changes
    return tiny_run(sweep / name, shared=sweep / "shared", **settings)


def first_step(reports: list[dict]) -> int:
    return min(r["step"] for r in reports if r["stage"] in ("warm_up", "private_training"))


def picture(folder: Path) -> bytes:
    return (folder / "central_images" / "grid.png").read_bytes()


def mechanisms(folder: Path) -> tuple[tuple, tuple]:
    plan = json.loads((folder / "privacy.json").read_text())
    central, dp_sgd = plan["central"], plan["dp_sgd"]
    return (
        (central["sample_rate"], central["noise_multiplier"], central["num_releases"]),
        (dp_sgd["sample_rate"], dp_sgd["noise_multiplier"], dp_sgd["num_steps"]),
    )


def ledger_of(sweep: Path) -> Ledger:
    (path,) = (sweep / "ledger").glob("*.jsonl")
    return Ledger.at(path)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two splits on the same central images, then other central images."""
    folder = tmp_path_factory.mktemp("sweep")
    reports = {
        "short": trial(folder, "short", 0.25),
        "long": trial(folder, "long", 0.75),
        "other": trial(folder, "other", 0.25, **{"central_images.noise_multiplier": 3.0}),
    }
    return folder, reports


def test_a_trial_branches_off_where_another_left(sweep):
    folder, reports = sweep
    assert picture(folder / "short") == picture(folder / "long")
    assert first_step(reports["short"]) == 1
    assert first_step(reports["long"]) == 4  # Three steps of warm-up were another's.
    assert first_step(reports["other"]) == 1
    assert picture(folder / "other") != picture(folder / "short")


def test_what_was_shared_is_what_the_trial_alone_would_have_made(sweep, tmp_path):
    folder, _ = sweep
    (tmp_path / "shared").mkdir()
    shutil.copy(folder / "shared" / "central_id", tmp_path / "shared")  # But no warm-up.
    reports = trial(tmp_path, "long", 0.75)
    assert first_step(reports) == 1
    expected, found = (torch.load(f / "long" / "model.pt") for f in (tmp_path, folder))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_release_is_charged_once_and_another_one_too(sweep):
    folder, _ = sweep
    parts = {name: mechanisms(folder / name) for name in ("short", "long", "other")}
    assert parts["short"][0] == parts["long"][0] != parts["other"][0]
    all_dp_sgd = [dp_sgd for _, dp_sgd in parts.values()]

    def epsilon(*central: tuple) -> float:
        return epsilon_of_mechanisms((*central, *all_dp_sgd), 1e-5, "zero_out", FINE)

    once = epsilon(parts["short"][0], parts["other"][0])
    every_time = epsilon(*(central for central, _ in parts.values()))
    never = epsilon(parts["other"][0])
    assert every_time > once * 1.02
    assert never < once * 0.98
    assert ledger_of(folder).epsilon_of_run("tiny") == pytest.approx(once, rel=2e-3)
    assert ledger_of(folder).summary()["epsilon_committed"] == pytest.approx(once, rel=2e-3)


def test_each_trial_alone_still_counts_its_central_images(sweep):
    folder, reports = sweep
    entries = {e["end_step"]: e for e in ledger_of(folder).summary()["entries"]}
    for name in ("short", "long"):
        central, dp_sgd = mechanisms(folder / name)
        alone = epsilon_of_mechanisms((central, dp_sgd), 1e-5, "zero_out", FINE)
        assert reports[name][-1]["epsilon"] == pytest.approx(alone, rel=1e-6)
        assert alone == pytest.approx(1.0, rel=2e-3)
    assert entries[STEPS - 9]["epsilon"] == pytest.approx(1.0, rel=5e-3)


def test_a_state_whose_central_images_are_gone_is_refused(tmp_path):
    kept = {"runtime.keep_checkpoints": True}
    trial(tmp_path, "one", 0.25, **kept)
    (tmp_path / "one" / "evaluation.json").unlink()
    shutil.rmtree(tmp_path / "shared")
    before = ledger_of(tmp_path).path.read_bytes()
    with pytest.raises(ConfigError, match="belongs to another"):
        trial(tmp_path, "one", 0.25, **kept)
    assert ledger_of(tmp_path).path.read_bytes() == before


def test_without_a_state_other_central_images_make_another_run_which_is_charged(tmp_path):
    trial(tmp_path, "one", 0.25)
    once = ledger_of(tmp_path).epsilon_of_run("tiny")
    (tmp_path / "one" / "evaluation.json").unlink()
    shutil.rmtree(tmp_path / "shared")
    trial(tmp_path, "one", 0.25)
    keys = {entry["trial"] for entry in ledger_of(tmp_path).summary()["entries"]}
    assert len(keys) == 2
    assert ledger_of(tmp_path).epsilon_of_run("tiny") > 1.1 * once


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sweep_s_budget_pays_for_the_release_once(tmp_path, sampler):
    """Two shares: each was planned with its central images, of which the second's are free."""
    scope = {"privacy.scope": "sweep", "privacy.num_shares": 2}
    scope |= {"privacy.adaptive": sampler == "tpe", "privacy.target_delta": 1e-5}
    scope |= {"runtime.log_every": STEPS}
    for name, split in (("short", 0.25), ("long", 0.75)):
        trial(tmp_path, name, split, **scope)
    assert ledger_of(tmp_path).epsilon_of_run("tiny") < 0.985
    trial(tmp_path / "apart", "short", 0.25, **scope)
    trial(tmp_path / "apart", "long", 0.75, **scope, **{"central_images.pixel_center": 0.5})
    assert ledger_of(tmp_path / "apart").epsilon_of_run("tiny") > 0.99


def test_no_more_states_are_kept_than_stated_and_the_longest_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", "run")
    warm_up = Trajectory(tmp_path / "shared", "t" * 64)
    for step in (10, 20, 30, 31, 50, 60, 70, 80):
        checkpoints.save({"stage": "warm_up", "step": step})
        warm_up.keep(checkpoints)
    kept = sorted(int(p.stem) for p in (tmp_path / "shared").glob("*/*.pt"))
    assert len(kept) == released._KEPT
    assert kept[-1] == 80
    assert 31 not in kept
    fresh = Checkpoints(tmp_path / "fresh", "fresh")
    warm_up.start(fresh, 69)
    assert fresh.load() == {"stage": "warm_up", "step": max(s for s in kept if s <= 69)}


def test_a_selection_s_trials_stay_independent():
    overrides = {
        "privacy.scope": "selection", "sampler": "random", "num_trials": None,
        "objective.metric": "dp_accuracy", "privacy.dp_accuracy_stddev": 20,
    }  # fmt: skip
    quickstart = Path(__file__).parents[1] / "data" / "sweep.yaml"
    assert not shares_central_images(load_sweep(quickstart, overrides).run)
    assert shares_central_images(load_sweep(quickstart, {}).run)
    assert not shares_central_images(load_sweep(quickstart, {}).run, replicates=2)
