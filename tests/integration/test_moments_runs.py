"""Runs on class moments, and methods that train nothing: charged once, kept, replayed, released."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from two_ranks import StopRunError, start_ranks, stop_at, tiny_run

from core.__main__ import main
from core.config import load, nested
from core.pipeline import released
from core.pipeline import run as pipeline
from core.privacy.ledger.ledger import Ledger
from core.privacy.mechanisms.moments import Moments
from sweep.config.sweep import load_sweep

STARTED = {
    "central_images.kind": "moments",
    "central_images.noise_multiplier": 8.0,
    "central_images.num_components": 10,
    "sampler.closed_form_share": 0.3,
    "runtime.checkpoint_every": 1,
    "runtime.log_every": 1,
}
MOMENTS = {"method": "moments", "central_images.num_components": 10}
MERF = {
    "method": "dp_merf",
    "frequency.num_features": 50,
    "frequency.num_steps": 4,
    "frequency.batch_size": 20,
    "frequency.num_images": 40,
}
METHODS = {"started": STARTED, "moments": MOMENTS, "dp_merf": MERF}
KINDS = {
    "started": ["moments", "dp_sgd"],
    "moments": ["moments"],
    "dp_merf": ["frequency"],
}


@pytest.fixture(scope="module", params=list(METHODS))
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, tiny_run(folder, **METHODS[request.param])


def entries(folder: Path) -> list[dict]:
    (path,) = (folder / "ledger").glob("*.jsonl")
    return Ledger.at(path).summary()["entries"]


def model(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("release_moments", "release_features"):
        monkeypatch.setattr(released, name, lambda *_: pytest.fail("released again"))


def test_all_that_is_released_is_charged_and_stated(whole):
    name, folder, reports = whole
    (entry,) = entries(folder)
    assert [event["kind"] for event in entry["events"]] == KINDS[name]
    assert entry["state"] == "committed"
    plan, end = json.loads((folder / "privacy.json").read_text()), reports[-1]
    assert 0.99 < end["epsilon"] == plan["epsilon"] <= 1.0
    assert entry["epsilon"] == pytest.approx(end["epsilon"], abs=1e-5)
    if name != "started":
        assert [report["stage"] for report in reports] == ["evaluation", "done"]
        assert end["epsilon_central"] + end["epsilon_frequency"] == end["epsilon"]
        assert end["epsilon_dp_sgd"] == 0
    pictures = {"dp_merf": "frequency"}.get(name, "central_images")
    assert (folder / pictures / "grid.png").exists()
    assert tiny_run(folder, **METHODS[name]) == [end]  # As it was when it ended.


def test_a_bundle_draws_the_images_of_the_run(whole, tmp_path, monkeypatch, capsys):
    _, folder, _ = whole
    bundle = tmp_path / "bundle"
    formats = ["--formats", "npz,generator"]
    assert main(["release", "--run-dir", str(folder), "--out", str(bundle), *formats]) == 0
    capsys.readouterr()
    with np.load(folder / "synthetic" / "images.npz") as stored:
        images = stored["images"]
    count = ["--num-images", str(len(images))]
    for number, source in enumerate((["--bundle", str(bundle)], ["--run-dir", str(folder)])):
        out = tmp_path / f"{number}.npz"
        assert main(["generate", *source, *count, "--out", str(out)]) == 0
        with np.load(out) as drawn:
            assert np.array_equal(drawn["images"], images)
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_interrupted_after_the_release_it_goes_on_without_another(whole, tmp_path, monkeypatch):
    name, folder, _ = whole

    def fail(*_: object) -> None:
        raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "generate", fail)
        with pytest.raises(RuntimeError, match="gone"):
            tiny_run(tmp_path, **METHODS[name])
    assert [entry["state"] for entry in entries(tmp_path)] == ["committed"]
    forbid(monkeypatch)
    end = tiny_run(tmp_path, **METHODS[name])[-1]
    assert end["stage"] == "done"
    assert same(model(tmp_path), model(folder))
    assert [e["events"] for e in entries(tmp_path)] == [e["events"] for e in entries(folder)]


@pytest.mark.parametrize("step", [2, 5])
def test_interrupted_in_training_it_goes_on_bit_for_bit(tmp_path, monkeypatch, step):
    tiny_run(tmp_path / "whole", **STARTED)

    with pytest.raises(StopRunError):
        tiny_run(tmp_path / "run", stop_at(step), **STARTED)
    forbid(monkeypatch)
    tiny_run(tmp_path / "run", **STARTED)
    assert same(model(tmp_path / "run"), model(tmp_path / "whole"))


def test_two_ranks_give_the_model_of_one(tmp_path):
    tiny_run(tmp_path / "one", **STARTED)
    start_ranks(tmp_path, 2, **STARTED)
    found = model(tmp_path / "run")
    for name, value in model(tmp_path / "one").items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


def test_trials_with_the_same_moments_have_them_from_one_release(tmp_path, monkeypatch):
    """Whatever their split and learning rate; another noise is another release."""
    drawn: list[Moments] = []
    release = released.release_moments

    def counted(*arguments: object) -> Moments:
        drawn.append(release(*arguments))
        return drawn[-1]

    monkeypatch.setattr(released, "release_moments", counted)
    changes = [
        {},
        {"stage_split": 0.0, "private_training.learning_rate": 1e-3},
        {"central_images.noise_multiplier": 9.0},
    ]
    own = {"runtime.ledger": str(tmp_path / "ledger")}
    for number, change in enumerate(changes):
        settings = STARTED | own | change
        tiny_run(tmp_path / str(number), shared=tmp_path / "shared", **settings)
    assert len(drawn) == 2
    grids = [(tmp_path / str(n) / "central_images" / "grid.png").read_bytes() for n in range(3)]
    assert grids[0] == grids[1] != grids[2]
    names = [e["events"][0]["release"] for e in entries(tmp_path)]
    assert names[0] == names[1] != names[2]
    assert all(names)
    (path,) = (tmp_path / "ledger").glob("*.jsonl")
    together = Ledger.at(path).summary()["epsilon_committed"]
    alone = sum(
        json.loads((tmp_path / str(n) / "privacy.json").read_text())["epsilon"] for n in (0, 1, 2)
    )
    assert together < alone


def test_a_sweep_searches_moments_and_the_method():
    choices = ["dp_feta", "moments", "dp_merf", "dpdm"]
    space = {"search_space.method.choices": choices}
    space |= {"search_space.central_images.num_components.low": 5}
    space |= {
        "search_space.central_images.num_components.high": 40,
        "central_images.kind": "moments",
    }
    sweep = load_sweep(Path("tests/data/sweep.yaml"), space)
    for method in choices:
        config = sweep.trial_config({"method": method, "central_images.num_components": 12})
        assert config.uses_moments == (method in ("dp_feta", "moments"))
        assert (config.private_steps == 0) == (method in ("moments", "dp_merf"))
        assert load(nested(config), {}) == config


def test_the_owner_inspects_what_denoises(whole, capsys):
    name, folder, _ = whole
    command = ["inspect", "--run-dir", str(folder), "--max-images", "60"]
    assert main(command) == (2 if name == "dp_merf" else 0)
    told = capsys.readouterr()
    assert ("trains no denoiser" in told.err) == (name == "dp_merf")
    assert ("membership attack: area" in told.out) == (name != "dp_merf")


def test_account_tells_what_moments_cost(capsys):
    command = ["account", "--config", "core/configs/digits.yaml", "privacy.target_epsilon=2"]
    pairs = ["central_images.kind=moments", "central_images.noise_multiplier=8"]
    assert main([*command, *pairs]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^moments +epsilon 0\.\d+ alone", told, re.M)
    assert "by central_images.per_class" not in told
    assert main([*command, "method=moments"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^moments +epsilon (2|1\.99\d*) alone", told, re.M)
    assert "no DP-SGD: the release has noise multiplier" in told
