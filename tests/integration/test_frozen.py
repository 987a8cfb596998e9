"""What no change of the structure may change: an interrupted run goes on, keys and names stay."""

import json
import shutil
import sys
from pathlib import Path

import interrupted_run
import pytest
from two_ranks import tiny_run

from core.__main__ import main
from core.pipeline import identity
from core.privacy.keys import KeyedStream, MasterSecret
from core.privacy.ledger.ledger import Ledger

FILES = {
    "central_images/grid.png",
    "classes.json",
    "config.yaml",
    "environment.json",
    "evaluation.json",
    "identity.json",
    "metrics.jsonl",
    "model.pt",
    "privacy.json",
    "run.lock",
    "run.log",
    "synthetic/grid.png",
    "synthetic/images.npz",
    "trial_id",
}


@pytest.fixture
def resumed(tmp_path, monkeypatch) -> Path:
    """The interrupted run, finished by the code of now as if it were the code of then."""
    folder = tmp_path / "kept"
    shutil.copytree(interrupted_run.FOLDER, folder)
    (folder / "master.secret").chmod(0o600)
    monkeypatch.setenv("FETA_SWEEP_SECRET_FILE", str(folder / "master.secret"))
    monkeypatch.chdir(folder)
    begun_with = json.loads(Path("run/identity.json").read_text())["computed by"]
    monkeypatch.setattr(identity, "computed_by", lambda _: begun_with)
    assert main(interrupted_run.command(folder)) == 0
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(told: list[dict]) -> dict[int, float]:
    """By step of DP-SGD; from the second one on they depend on the noise."""
    return {line["step"]: line["loss"] for line in told if line["stage"] == "private_training"}


def test_an_interrupted_run_goes_on_with_its_noise_and_its_charge(resumed):
    before = lines(next((interrupted_run.FOLDER / "ledger").glob("*.jsonl")))
    (path,) = (resumed / "ledger").glob("*.jsonl")
    Ledger.at(path).verify()
    after = lines(path)
    assert after[: len(before)] == before
    (commit,) = after[len(before) :]
    assert commit["kind"] == "commit"
    assert commit["key"] == before[-1]["key"]
    told = lines(resumed / "run" / "metrics.jsonl")
    expected = lines(interrupted_run.FOLDER / interrupted_run.EXPECTED)
    assert losses(told) == pytest.approx(losses(expected), rel=1e-4)
    assert list(losses(told)) == [7, 8, 9, 10, 11, 12]


def test_names_in_the_folder_and_the_files_stay(resumed):
    folder, kept = resumed / "run", interrupted_run.FOLDER / "run"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names >= FILES
    checkpoints, samples = names - FILES, "samples/000000"
    allowed = ("checkpoints/", "charged/", samples, "identity.json.lock")
    assert all(name.startswith(allowed) for name in checkpoints), checkpoints
    for name in ("config.yaml", "privacy.json", "identity.json", "trial_id"):
        assert (folder / name).read_text() == (kept / name).read_text(), name
    result = json.loads((folder / "evaluation.json").read_text())
    assert set(result) >= {
        "step", "stage", "accuracy", "fid_cnn", "epsilon", "epsilon_central", "epsilon_frequency",
        "epsilon_dp_sgd", "noise_multiplier", "seconds", "identity", "fingerprint", "name", "tags",
        "scored",
    }  # fmt: skip
    entries = lines(next((resumed / "ledger").glob("*.jsonl")))
    for entry in entries:
        assert {"kind", "sequence", "time", "previous", "hash"} <= set(entry)
    assert set(entries[1]["key"]) == {"run", "trial", "stage", "first_step", "end_step"}
    kinds = [event["kind"] for event in entries[1]["events"]]
    assert kinds == ["central_images", "dp_sgd"]


def test_keys_of_masks_and_noise_stay():
    key = MasterSecret(b"s" * 32).derive(
        fingerprint="f", trial="t", stage="private_training", purpose="noise"
    )
    assert key.hex() == "2b824b482d86775ca3bf0888d23876a694addaaf783ec96eccf3d597ad6ea78d"
    assert KeyedStream(key).bits(3, 2).tolist() == [8042751654314464731, 10687636942456897198]
    assert KeyedStream(key).normal(3, 2).tolist() == pytest.approx(
        [-1.1315389545350225, -0.6163220082535574], rel=1e-14
    )


def test_nothing_is_opened_before_it_is_charged_nor_drawn_before_it_is_opened(tmp_path):
    tiny_run(tmp_path / "a", **{"runtime.ledger": str(tmp_path / "ledger")})  # Knows the source.
    story = ["make_plan", "identify", "require_space", "Ledger.reserve", "load_dataset"]
    begun: list[str] = []

    def record(frame, event, _) -> None:
        if event == "call":
            name, module = frame.f_code.co_qualname, frame.f_globals.get("__name__", "")
            if name in story and module.startswith("core.") and name not in begun:
                begun.append(name)
            if name == "KeyedStream.bits" and name not in begun:
                begun.append(name)

    sys.setprofile(record)
    try:
        tiny_run(tmp_path / "b", **{"runtime.ledger": str(tmp_path / "ledger")})
    finally:
        sys.setprofile(None)
    assert begun == [*story, "KeyedStream.bits"]
