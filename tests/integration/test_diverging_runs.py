"""A run whose numbers are no longer finite fails: nothing more is charged, nothing is a result."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from two_ranks import TINY, in_processes, tiny_run

from core import distributed
from core.__main__ import main
from core.config import load
from core.diffusion.ema import Ema
from core.errors import NotFiniteError
from core.evaluation import scoring
from core.pipeline import early_scores
from core.pipeline import run as pipeline
from core.privacy.ledger.ledger import Ledger
from core.privacy.mechanisms.per_example_gradients import PerExampleGradients
from core.training import stages
from core.training.checkpoint import Checkpoints
from core.training.loop import Loop, Model, Stage

HUGE = 1e20
LONG = {"training.num_steps": 80, "runtime.checkpoint_every": 1, "runtime.log_every": 1}
"""Half of the steps are DP-SGD's: more than are noted together."""
RESULTS = ("evaluation.json", "model.pt", "synthetic/images.npz", "stopped.json")


class KillError(Exception):
    """Stands for a run that is interrupted."""


def entry_of(folder: Path) -> dict:
    (path,) = (folder / "ledger").glob("*.jsonl")
    (entry,) = Ledger.at(path).summary()["entries"]
    return entry


def every_json(folder: Path) -> Iterator[object]:
    """All JSON that a run wrote, by a reader who takes nothing that is not JSON."""

    def refuse(text: str) -> None:
        pytest.fail(f"{text} is no JSON")

    for path in (*folder.rglob("*.json"), *folder.rglob("*.jsonl")):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for line in lines:
            yield json.loads(line, parse_constant=refuse)


def fails(folder: Path, message: str, monkeypatch, **changes: object) -> dict | None:
    """Runs what must fail, twice; returns the ledger's entry, which only the first may change."""
    told: list[dict] = []
    with pytest.raises(NotFiniteError, match=message) as first:
        tiny_run(folder, told.append, **changes)
    assert "\n" not in str(first.value)
    assert list(every_json(folder))
    assert not [name for name in RESULTS if (folder / name).exists()]
    assert all(math.isfinite(v) for r in told for v in r.values() if isinstance(v, float))
    if (folder / "checkpoints" / "last.pt").exists():
        state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
        assert all(v.isfinite().all() for v in state["denoiser"].values())
        assert all(v.isfinite().all() for v in state["ema"]["module"].values())
    ledgers = {path: path.read_bytes() for path in (folder / "ledger").glob("*.jsonl")}
    with monkeypatch.context() as closed:
        closed.setattr(pipeline, "build_denoiser", lambda _: pytest.fail("it went on"))
        with pytest.raises(NotFiniteError) as again:
            tiny_run(folder, **changes)
    assert str(again.value) == str(first.value)
    assert ledgers == {path: path.read_bytes() for path in (folder / "ledger").glob("*.jsonl")}
    assert main(["release", "--run-dir", str(folder), "--out", str(folder / "bundle")]) == 2
    return entry_of(folder) if ledgers else None


def test_a_warm_up_that_diverges_ends_before_dp_sgd(tmp_path, monkeypatch):
    message = (
        r"^in warm_up at step \d of 40 the .* not finite, .*nothing of it can be used; start anew "
        r"with warm_up\.learning_rate below 1e\+20$"
    )
    changes = LONG | {"warm_up.learning_rate": HUGE, "runtime.num_pictures": 0}
    entry = fails(tmp_path, message, monkeypatch, **changes)
    assert entry is not None
    assert (entry["state"], entry["executed_steps"]) == ("committed", 0)


@pytest.mark.parametrize("split", [0.0, 0.5])
def test_dp_sgd_that_diverges_ends_there_and_settles_what_was_noted(tmp_path, monkeypatch, split):
    """Gradients that are not finite count as zero: it is the network's output that tells."""
    message = r"^in private_training at step 1 of \d+ the .*private_training\.learning_rate below"
    changes = LONG | {"private_training.learning_rate": HUGE, "stage_split": split}
    entry = fails(tmp_path, message, monkeypatch, **changes)
    assert entry is not None
    assert (entry["state"], entry["executed_steps"]) == ("committed", 25)


def test_a_run_without_privacy_is_held_to_the_same(tmp_path, monkeypatch):
    changes = {"method": "non_private", "private_training.learning_rate": HUGE}
    changes["runtime.num_pictures"] = 0
    message = r"^in non_private_training at step 2 of 6 .* private_training\.learning_rate below"
    assert fails(tmp_path, message, monkeypatch, **changes) is None


def test_a_private_loss_decides_nothing(tmp_path, monkeypatch):
    """One record's loss is NaN in each step: what is released is finite, and so is the model."""
    real = stages._loss

    def spoilt(config, network, *batch):
        loss = real(config, network, *batch)
        if isinstance(network, PerExampleGradients) and torch.is_grad_enabled():
            loss = torch.cat((loss[:1] * math.nan, loss[1:]))
        return loss

    monkeypatch.setattr(stages, "_loss", spoilt)
    reports = tiny_run(tmp_path, **{"runtime.log_every": 1})
    losses = [r["loss"] for r in reports if r["stage"] == "private_training"]
    assert len(losses) == 3
    assert all(math.isnan(loss) for loss in losses)
    model = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(value.isfinite().all() for value in model.values())
    written = [each for each in every_json(tmp_path) if isinstance(each, dict) and "loss" in each]
    assert [each["loss"] for each in written if each["stage"] == "private_training"] == 3 * ["NaN"]


def test_a_checkpoint_that_is_not_finite_is_not_trained_on(tmp_path, monkeypatch):
    def stop(report: dict) -> None:
        if report["step"] == 42:
            raise KillError

    with pytest.raises(KillError):
        tiny_run(tmp_path, stop, **LONG)
    before = entry_of(tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    next(iter(state["denoiser"].values())).view(-1)[0] = math.nan
    torch.save(state, path)
    with pytest.raises(NotFiniteError, match="in private_training at step 1 of 40 the training"):
        tiny_run(tmp_path, **LONG)
    assert entry_of(tmp_path) == before


def test_images_that_are_not_finite_are_no_result(tmp_path, monkeypatch):
    """A guidance that no float holds; the training itself is sound, so it is paid in full."""
    changes = {"sampler.guidance": 1e38, "runtime.num_pictures": 0}
    entry = fails(tmp_path, "^the network draws images that are not", monkeypatch, **changes)
    assert entry is not None
    assert (entry["state"], entry["executed_steps"]) == ("committed", 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"runtime.num_pictures": 5},
        {"early_scores.at": [0.34], "early_scores.num_images": 20, "runtime.num_pictures": 0},
    ],
)
def test_images_during_training_that_are_not_finite_end_it(tmp_path, monkeypatch, changes):
    changes = {"sampler.guidance": 1e38, **changes}
    message = r"^in warm_up at step [12] of 3 the network draws images that are not finite"
    entry = fails(tmp_path, message, monkeypatch, **changes)
    assert entry is not None
    assert entry["executed_steps"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_named_and_no_result(tmp_path, monkeypatch, value):
    found = {"fid_cnn": value}, {"real_statistics": "digest"}
    monkeypatch.setattr(scoring, "distribution_metrics", lambda *_: found)
    fails(tmp_path, rf"^the score fid_cnn is {value}, so the run has failed", monkeypatch)


def test_an_early_score_that_is_not_finite_is_not_told(tmp_path, monkeypatch):
    monkeypatch.setattr(early_scores, "downstream_accuracy", lambda *_: math.nan)
    changes = {"early_scores.at": [0.34], "early_scores.num_images": 20}
    message = r"^in warm_up at step 2 of 3 the score early_accuracy is nan"
    fails(tmp_path, message, monkeypatch, **changes)
    assert not (tmp_path / "early_scores.json").exists()


def test_a_generator_of_the_frequency_stage_that_diverges_teaches_nothing(tmp_path, monkeypatch):
    changes = {
        "method": "feta_pro",
        "privacy.target_epsilon": 3.0,
        "frequency.noise_multiplier": 2.0,
        "frequency.num_features": 50,
        "frequency.num_steps": 4,
        "frequency.batch_size": 20,
        "frequency.num_images": 40,
        "frequency.learning_rate": 1e30,
        "training.num_steps": 10,
    }
    message = r"^the generator of the frequency stage diverged.* frequency\.learning_rate below"
    entry = fails(tmp_path, message, monkeypatch, **changes)
    assert entry is not None
    assert entry["executed_steps"] == 0


def test_weights_that_are_not_finite_draw_nothing(tmp_path, capsys):
    tiny_run(tmp_path)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    next(iter(state.values())).view(-1)[0] = math.inf
    torch.save(state, tmp_path / "model.pt")
    drawn = ["--num-images", "10", "--out", str(tmp_path / "more.npz")]
    assert main(["generate", "--run-dir", str(tmp_path), *drawn]) == 2
    assert "holds weights that are not finite" in capsys.readouterr().err
    assert main(["release", "--run-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


class Sound:
    """A stage of two steps whose second spoils something; on rank `rank` alone."""

    def __init__(self, folder: Path, spoilt: str, rank: int = 0) -> None:
        self.model = nn.Linear(2, 2)
        self.ema = Ema(self.model, 0.9, posthoc=True)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.spoilt, self.rank = spoilt, rank
        self.config = load({}, TINY | {"runtime.checkpoint_every": 1, "runtime.device": "cpu"})
        self.checkpoints = Checkpoints(folder, "identity")

    def step(self, number: int) -> torch.Tensor:
        loss = self.model(torch.ones(1, 2)).square().sum()
        loss.backward()
        self.optimizer.step()
        if number == 1 and distributed.rank() == self.rank:
            assert self.ema.power is not None
            moments = next(iter(self.optimizer.state.values()))
            places = {
                "parameter": self.model.bias.data,
                "average": self.ema.module.bias.data,
                "power average": self.ema.power.values[1],
                "moment": moments["exp_avg_sq"][0],
                "loss": loss.data,
                "nothing": torch.zeros(1),
            }
            places[self.spoilt].fill_(math.inf)
        return loss.detach()

    def run(self, seen: list[int]) -> None:
        stage = Stage("warm_up", 2, self.step, self.optimizer)
        model = Model(self.model, self.ema)  # type: ignore[arg-type]
        Loop(self.config, model, self.checkpoints, lambda _: None, [seen.append]).run(stage)


@pytest.mark.parametrize("spoilt", ["parameter", "average", "power average", "moment", "loss"])
def test_whatever_is_not_finite_ends_the_training_at_that_step(tmp_path, spoilt):
    seen: list[int] = []
    with pytest.raises(NotFiniteError, match="in warm_up at step 2 of 2 the training diverged"):
        Sound(tmp_path, spoilt).run(seen)
    assert seen == [0, 1]
    kept = Checkpoints(tmp_path, "identity").load()
    assert kept is not None
    assert kept["step"] == 1
    Sound(tmp_path / "sound", "nothing").run(seen)
    assert seen == [0, 1, 0, 1, 2]


def _one_rank_sees_it(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    seen: list[int] = []
    with pytest.raises(NotFiniteError):
        Sound(folder, "average", rank=1).run(seen)
    assert seen == [0, 1]
    distributed.leave()


def test_all_ranks_end_where_one_sees_it(tmp_path):
    assert in_processes(_one_rank_sees_it, (0, tmp_path), (1, tmp_path)) == [0, 0]
