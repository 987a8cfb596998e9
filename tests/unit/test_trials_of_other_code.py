"""What a sweep makes of trials that other code failed with, or left a checkpoint of."""

import hashlib
import json
from pathlib import Path

import pytest
from test_report_parts import PLAN

from core.config import load, nested, yaml_subset
from core.errors import ConfigError
from core.io.code_digest import code_digest
from core.io.files import write_json
from sweep.config.sweep import SweepConfig, load_sweep
from sweep.driver.launch import _is_done, _require_same_code
from sweep.results.table import claimed_row, load_rows, print_results

SELECTION = {
    "privacy.scope": "selection",
    "objective.metric": "dp_accuracy",
    "privacy.dp_accuracy_stddev": 50,
    "sampler": "random",
    "num_trials": None,
}
PUBLIC = {"privacy.scope": "public", "dataset.public": True}


def sweep_of(folder: Path, **overrides: object) -> SweepConfig:
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_sweep("tests/data/sweep.yaml", {"storage_path": str(folder), **settings})


def trial(sweep: SweepConfig, name: str, code: str, **settings: object) -> tuple[Path, str]:
    """A trial that began with `code`; its folder and identity."""
    run_dir = sweep.folder / "trials" / name
    run_dir.mkdir(parents=True)
    config = load(nested(sweep.run), {k.replace("__", "."): v for k, v in settings.items()})
    (run_dir / "config.yaml").write_text(yaml_subset.dump(nested(config)))
    write_json(run_dir / "privacy.json", PLAN.summary())
    parts = {"computed by": {"code of core": code}, "others": {"trial_id": name}}
    write_json(run_dir / "identity.json", parts)
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return run_dir, digest


@pytest.mark.parametrize("code", ["this", "other"])
@pytest.mark.parametrize("identity", ["that failed", "a later one"])
def test_a_failure_is_for_good_only_for_what_failed(tmp_path, code, identity):
    """As a run says of itself: other code, or what began since, may not fail."""
    sweep = sweep_of(tmp_path)
    run_dir, digest = trial(sweep, "a", code_digest() if code == "this" else "other")
    failed_with = digest if identity == "that failed" else "0" * 64
    write_json(run_dir / "failed.json", {"identity": failed_with, "error": "the loss is nan"})
    (row,) = load_rows(sweep)
    assert (row.state, row.error) == ("failed", "the loss is nan")
    same = (code, identity) == ("this", "that failed")
    assert row.for_good is _is_done(sweep, row) is same


def test_a_selection_whose_trial_other_code_began_is_refused_by_its_name(tmp_path):
    """It would fail, and so rank last for good."""
    sweep = sweep_of(tmp_path, **SELECTION)
    run_dir, _ = trial(sweep, "a", "other")
    _require_same_code(sweep, load_rows(sweep))  # Without a checkpoint it draws anew.
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "last.pt").touch()
    with pytest.raises(ConfigError, match=rf"trial a in '{run_dir}' is of other code of core"):
        _require_same_code(sweep, load_rows(sweep))
    _require_same_code(sweep_of(tmp_path), load_rows(sweep))  # Elsewhere it is tried again.
    (run_dir / "error.txt").write_text("died\n")  # What has ended does not go on.
    _require_same_code(sweep, load_rows(sweep))
    other, _ = trial(sweep, "b", code_digest())
    (other / "checkpoints").mkdir()
    (other / "checkpoints" / "last.pt").touch()
    _require_same_code(sweep, load_rows(sweep))


def test_a_final_run_that_failed_is_told_with_its_reason(tmp_path, monkeypatch, capsys):
    sweep = sweep_of(tmp_path, **PUBLIC, final__dataset__path="/sensitive")
    searched, _ = trial(sweep, "searched", code_digest())
    result = {"accuracy": 0.5, "fid_cnn": 9.0, "seconds": 1.0, "identity": "x", "fingerprint": "y"}
    write_json(searched / "evaluation.json", result)
    run_dir, digest = trial(sweep, "last", code_digest(), dataset__public=False)
    monkeypatch.setattr("sweep.results.table.sweep_epsilon", lambda *_: 1.0)
    told = {}
    for failed_with in (digest, "0" * 64):
        failure = {"identity": failed_with, "error": "the loss is nan at D:1"}
        write_json(run_dir / "failed.json", failure)
        rows = load_rows(sweep)
        said = "final run: failed (the loss is nan at D:1), so nothing is claimed yet"
        assert claimed_row(sweep, rows) == (None, said)
        print_results(sweep, rows, 0, "here")
        told[failed_with] = capsys.readouterr().out
        assert said in told[failed_with]
        assert "not finished" not in told[failed_with]
    assert "goes on" not in told[digest]
    assert "so nothing is claimed yet; the same command goes on" in told["0" * 64]
