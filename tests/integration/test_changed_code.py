"""A run whose code, packages or device changed: named, and never the same noise for another sum."""

import json
from pathlib import Path

import pytest
import torch
from two_ranks import StopRunError, stop_at, tiny_run

from core.errors import ConfigError
from core.pipeline import identity
from core.pipeline import run as pipeline
from core.pipeline.identity import differences
from core.privacy.ledger.ledger import Ledger
from core.privacy.mechanisms.dp_sgd import DpSgdOptimizer

SETTINGS = {"training.num_steps": 4, "runtime.log_every": 1, "runtime.checkpoint_every": 100}


def entries(folder: Path) -> list[dict]:
    (path,) = (folder / "ledger").glob("*.jsonl")
    return Ledger.at(path).summary()["entries"]


@pytest.fixture
def code(monkeypatch):
    """Sets what stands for the code's digest."""

    def change(value: str) -> None:
        monkeypatch.setattr(identity, "code_digest", lambda: value)

    change("old")
    return change


@pytest.fixture
def sums(monkeypatch) -> list[torch.Tensor]:
    """Noisy sums of DP-SGD in units of the noise, in the order of its steps."""
    found: list[torch.Tensor] = []
    add_noise = DpSgdOptimizer.add_noise

    def record(self: DpSgdOptimizer) -> None:
        add_noise(self)
        flat = torch.cat([p.grad.flatten() for p in self.params])
        found.append(flat / (self.noise_multiplier * self.max_grad_norm))

    monkeypatch.setattr(DpSgdOptimizer, "add_noise", record)
    return found


def test_without_a_checkpoint_other_code_draws_new_noise_and_is_charged(tmp_path, code, sums):
    """With the old noise, the difference of two sums would be that of the gradients alone."""
    settings = SETTINGS | {"stage_split": 0.0}  # A warm-up would end with a checkpoint.
    for _ in range(2):
        with pytest.raises(StopRunError):
            tiny_run(tmp_path, stop_at(1), **settings)
    assert len(entries(tmp_path)) == 1
    code("new")
    reports = tiny_run(tmp_path, **settings)
    once, again, other = sums[:3]
    assert torch.equal(once, again)  # The same code replays.
    assert (other - once).std() > 1.3  # Of independent noise sqrt(2), of equal noise nearly 0.
    first, second = entries(tmp_path)
    assert first["trial"] != second["trial"]
    assert second["state"] == "committed"
    note = "code of core changed): it draws new noise and is charged again"
    assert note in reports[0]["note"]
    assert all("note" not in report for report in reports[1:])
    assert note in (tmp_path / "run.log").read_text()
    assert "identity.json" in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.setattr(identity, "code_digest", lambda: "new"), "code of core changed"),
        (lambda m: m.setattr(torch, "__version__", "9.9.9"), f"{torch.__version__} -> 9.9.9"),
        (lambda m: m.setattr(identity, "_version", lambda _: "0.1"), "-> 0.1; opacus"),
    ],
)
def test_with_a_checkpoint_it_is_refused_and_says_what_changed(tmp_path, monkeypatch, change, text):
    settings = SETTINGS | {"runtime.checkpoint_every": 1}
    with pytest.raises(StopRunError):
        tiny_run(tmp_path, stop_at(3), **settings)
    before = entries(tmp_path)
    with monkeypatch.context() as changed:
        change(changed)
        changed.setattr(pipeline, "load_dataset", lambda *_: pytest.fail("the data was opened"))
        with pytest.raises(ConfigError, match="restore what it was begun with, or choose") as error:
            tiny_run(tmp_path, **settings)
    assert text in str(error.value)
    assert entries(tmp_path) == before
    assert tiny_run(tmp_path, **settings)[-1]["stage"] == "done"  # Restored, it goes on.
    assert len(entries(tmp_path)) == 1


def test_a_run_finished_by_other_code_is_shown_and_not_charged_again(tmp_path, code, capsys):
    done = tiny_run(tmp_path, **SETTINGS)[-1]
    before = entries(tmp_path)
    code("new")
    for noted in (True, False):  # Also one of a version that did not note what computed it.
        (shown,) = tiny_run(tmp_path, **SETTINGS)
        assert ("code of core changed" if noted else "is not noted") in shown.pop("note")
        assert shown == done
        (tmp_path / "identity.json").unlink(missing_ok=True)
    assert entries(tmp_path) == before
    code("old")
    assert tiny_run(tmp_path, **SETTINGS) == [done]
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps(stored | {"fingerprint": "0" * 64}))
    with pytest.raises(ConfigError, match="holds a run on other data"):
        tiny_run(tmp_path, **SETTINGS)
    assert entries(tmp_path) == before


def test_a_sweep_s_central_images_are_drawn_anew_by_other_code(tmp_path, code):
    def trial(name: str, split: float) -> tuple[list[dict], bytes]:
        settings = SETTINGS | {"runtime.ledger": str(tmp_path / "ledger"), "stage_split": split}
        reports = tiny_run(tmp_path / name, shared=tmp_path / "shared", **settings)
        return reports, (tmp_path / name / "central_images" / "grid.png").read_bytes()

    def releases() -> list[str]:
        events = [event for entry in entries(tmp_path) for event in entry["events"]]
        return [event["release"] for event in events if event["kind"] == "central_images"]

    _, first = trial("a", 0.25)
    _, same = trial("b", 0.5)
    assert first == same
    code("new")
    reports, other = trial("c", 0.75)
    assert other != first
    assert "(code of core changed): others are drawn, and charged once more" in reports[0]["note"]
    assert "since this run was begun" not in reports[0]["note"]
    assert len(releases()) == 3
    assert len(set(releases())) == 2


def test_ranks_that_differ_are_refused(monkeypatch):
    parts: identity.Parts = {"computed by": {"torch": "1"}, "others": {"data": "x"}}
    assert identity.digest_of(parts) == identity.digest_of(parts)
    for group, name, value, text in (
        ("computed by", "torch", "2", "torch 2 -> 1"),
        ("others", "data", "y", "data changed"),
    ):
        theirs = parts | {group: parts[group] | {name: value}}
        everyone = [parts, theirs]
        monkeypatch.setattr(identity.distributed, "all_gather_object", lambda _, e=everyone: e)
        with pytest.raises(ConfigError, match=f"the ranks differ .{text}.: give every machine"):
            identity.digest_of(parts)


def test_differences_name_values_but_no_digest():
    earlier = {"computed by": {"torch": "1", "code of core": "a"}, "others": {"data": "f" * 64}}
    now = {"computed by": {"torch": "2", "code of core": "b"}, "others": {"data": "e" * 64}}
    assert differences(earlier, earlier) == []
    assert differences(earlier, now) == ["torch 1 -> 2", "code of core changed", "data changed"]


@pytest.mark.parametrize("name", ["identity.json", "failed.json", "evaluation.json"])
def test_a_damaged_file_of_a_run_is_one_sentence(tmp_path, name):
    with pytest.raises(StopRunError):
        tiny_run(tmp_path, stop_at(1), **SETTINGS)
    (tmp_path / name).write_text("{")
    with pytest.raises(ConfigError, match=rf"{name}' cannot be read \(JSONDecodeError\): restore"):
        tiny_run(tmp_path, **SETTINGS)


def test_where_nothing_is_noted_nothing_is_claimed_to_have_changed(tmp_path):
    """The run goes on with the same noise, and is charged once."""
    with pytest.raises(StopRunError):
        tiny_run(tmp_path, stop_at(1), **SETTINGS)
    (tmp_path / "identity.json").unlink()
    reports = tiny_run(tmp_path, **SETTINGS)
    assert "is not noted: where that differs, it draws new noise" in reports[0]["note"]
    assert len(entries(tmp_path)) == 1
