"""What is made of a finished run: the bundle to publish, and the page for its owner alone."""

import base64
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pyarrow import parquet
from safetensors.torch import load_file
from two_ranks import tiny_run

from core.__main__ import main
from core.config import load
from core.data import load_dataset
from core.diffusion.denoiser import build_denoiser
from core.errors import ConfigError
from core.generation.generator import GENERATOR, load_generator, write_generator
from core.generation.png import encode_png
from core.io.files import write_json
from core.privacy.accounting.rounding import upward
from core.privacy.keys import MasterSecret
from core.privacy.ledger.card import three_epsilons
from core.publish.class_table import class_rows
from core.publish.release import release_card
from core.record.folder import RunFolder
from sweep.tracking.client import Tracker


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("after") / "run"
    tiny_run(folder)
    return folder


@pytest.fixture(scope="module")
def released(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("released") / "bundle"
    arguments = ["release", "--run-dir", str(run), "--out", str(out), "--license", "cc-by-4.0"]
    assert main(arguments) == 0
    return out


@pytest.fixture
def bundle(released, tmp_path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "bundle"))


def stored_images(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as arrays:
        return arrays["images"], arrays["labels"]


def test_the_bundles_generator_draws_what_the_run_would(run, released, tmp_path):
    settings = ["seed=3", "evaluation.batch_size=7", "sampler.num_steps=3", "runtime.device=cpu"]
    for source, folder in (("--run-dir", run), ("--bundle", released)):
        out = tmp_path / f"{source}.npz"
        command = ["generate", source, str(folder), "--num-images", "23", "--out", str(out)]
        assert main([*command, *settings]) == 0
    ours, theirs = (stored_images(tmp_path / f"{name}.npz") for name in ("--run-dir", "--bundle"))
    assert ours[0].shape == (23, 1, 8, 8)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert ours[0].std() > 1
    assert (tmp_path / "--bundle.png").read_bytes().startswith(b"\x89PNG")


def test_the_generator_is_the_averaged_weights_and_public_settings_alone(run, released):
    ours = torch.load(run / "model.pt", weights_only=True)
    weights = load_file(released / "generator" / "weights.safetensors")
    assert weights.keys() == ours.keys()
    assert all(torch.equal(weights[name], ours[name]) for name in ours)
    settings = json.loads((released / "generator" / "settings.json").read_text())
    sections = {"model", "diffusion", "sampler", "dataset", "central_images", "evaluation"}
    assert settings.keys() == {"seed", *sections}
    assert settings["central_images"].keys() == {"kind", "image_size", "num_components"}
    assert settings["evaluation"].keys() == {"batch_size"}
    assert settings["dataset"] == {"image_size": 8, "channels": 1, "num_classes": 10}


def test_a_generator_of_many_classes_and_few_pixels_loads(tmp_path):
    """Defaults of what drawing does not use must not stand in the way."""
    changes = {
        "dataset.num_classes": 700,
        "dataset.image_size": 4,
        "central_images.image_size": 4,
        "evaluation.num_images": 1400,
        "model.base_channels": 8,
    }
    config = load({}, changes)
    torch.save(build_denoiser(config).state_dict(), tmp_path / "model.pt")
    names = [str(label) for label in range(700)]
    write_generator(tmp_path / GENERATOR, tmp_path / "model.pt", config, names)
    again, denoiser = load_generator(tmp_path / GENERATOR, {"runtime.device": "cpu"})
    assert again.dataset.num_classes == 700
    assert not denoiser.training
    with pytest.raises(ConfigError, match=r"weights of another network .*model\.\* overrides"):
        load_generator(tmp_path / GENERATOR, {"model.base_channels": 16})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: (b / "generator" / "extra.pt").write_bytes(b"x"), "extra.pt' is not listed"),
        (lambda b: (b / "images" / "digests.json").write_text("{}"), "digests.json' is not listed"),
        (
            lambda b: (b / "generator" / "weights.safetensors").write_bytes(b"x"),
            "weights.safetensors' is changed",
        ),
        (lambda b: (b / "README.md").write_text("x"), "README.md' is changed"),
        (lambda b: (b / "grid.png").unlink(), "grid.png' is missing"),
        (lambda b: (b / "more").symlink_to(b.parent), "is a link"),
        (lambda b: (b / "non_private").mkdir(), "is not private: remove it"),
    ],
)
def test_a_bundle_that_was_touched_is_refused(bundle, change, message, tmp_path, capsys):
    change(bundle)
    assert main(["release", "--verify", "--out", str(bundle)]) == 2
    assert message in capsys.readouterr().err
    more = ["--num-images", "4", "--out", str(tmp_path / "x.npz")]
    assert main(["generate", "--bundle", str(bundle), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


def test_the_dataset_card_is_what_the_hub_reads(released):
    text = (released / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    header = yaml.safe_load(front)
    assert header["license"] == "cc-by-4.0"
    assert header["task_categories"] == ["image-classification"]
    assert header["size_categories"] == ["n<1K"]
    (split,) = header["configs"][0]["data_files"]
    assert split["split"] == "train"
    table = parquet.read_table(released / split["path"])
    image, label = header["dataset_info"]["features"]
    assert image == {"name": "image", "dtype": "image"}
    names = [str(each) for each in range(10)]
    assert list(label["dtype"]["class_label"]["names"].values()) == names
    stated = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert stated["image"]["_type"] == "Image"
    assert stated["label"] == {"_type": "ClassLabel", "names": names}
    assert table.column_names == ["image", "label"]
    card = json.loads((released / "privacy_card.json").read_text())
    assert card["statement"] in body
    assert f"| epsilon of one trial | {upward(card['epsilon_trial'])} |" in body


def test_the_bundles_page_reads_it_without_this_project(run, released):
    page = (released / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    ours = [block for block in blocks if "datasets" not in block]
    assert len(ours) == 2
    check = """
import sys
assert not {"core", "sweep"} & {*sys.modules}
assert weights and all(each.isfinite().all() for each in weights.values())
print(images.shape, labels[:3], class_names[-1], settings["dataset"]["image_size"], len(weights))
"""
    code = "\n".join([*ours, check]).replace("FOLDER", str(released))
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert not done.stderr
    count = len(torch.load(run / "model.pt", weights_only=True))
    assert done.stdout == f"(40, 1, 8, 8) [0 1 2] 9 8 {count}\n"


def test_without_parquet_and_generator_the_card_promises_neither(run, tmp_path, capsys):
    out = tmp_path / "small"
    assert main(["release", "--run-dir", str(run), "--out", str(out), "--formats", "npz"]) == 0
    assert "states no license" in capsys.readouterr().out
    text = (out / "README.md").read_text()
    assert "license: unknown" in text
    assert "load_dataset" not in text
    assert "generator/" not in text
    more = ["--num-images", "4", "--out", str(tmp_path / "x.npz")]
    assert main(["generate", "--bundle", str(out), *more]) == 2
    assert "holds no generator" in capsys.readouterr().err


def test_the_owners_page_shows_the_nearest_real_images(run, tmp_path, capsys):
    own = Path(shutil.copytree(run, tmp_path / "run"))
    # The first synthetic image is a copy of a real one, which the page must find.
    config = load(own / "config.yaml")
    real = load_dataset(config.dataset).train
    images, labels = stored_images(own / "synthetic" / "images.npz")
    images[5] = real.images[77].numpy()
    np.savez(own / "synthetic" / "images.npz", images=images, labels=labels)
    assert main(["inspect", "--run-dir", str(own), "--max-images", "200"]) == 0
    out = capsys.readouterr().out
    page = own / "non_private" / "inspection.html"
    assert f"NON-PRIVATE, for the owner of the data alone: {page}" in out
    text = page.read_text()
    assert "<strong>NON-PRIVATE</strong>" in text
    assert not re.search(r'(?:src|href)="(?!data:)', text)  # Opens without a network.
    copied = base64.b64encode(encode_png(real.images[77])).decode()
    first_pair = text.split('<div class="pair">')[1]
    assert first_pair.count(copied) == 3  # Itself, nearest in features, nearest in pixels.
    assert "REAL, by pixels" in first_pair
    assert (own / "non_private" / ".gitignore").read_text() == "*\n"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in own.glob("non_private/*")}
    assert modes["inspection.html"] == modes["inspection.json"] == 0o600
    assert stat.S_IMODE((own / "non_private").stat().st_mode) == 0o700
    found = json.loads((own / "non_private" / "inspection.json").read_text())["membership"]
    assert found["num_members"] == found["num_others"] == 200
    assert found["auc_interval"][0] < found["auc"] < found["auc_interval"][1]
    assert found["within_bound"] is True
    levels = [f"<td>{each['sigma']:.3g}</td><td>{each['auc']:.4f} (" for each in found["levels"]]
    assert len(levels) == 8
    assert all(level in text for level in levels)
    classes = json.loads((own / "non_private" / "inspection.json").read_text())["classes"]
    counts = load_dataset(config.dataset).test.labels.bincount(minlength=10).tolist()
    for kind in ("synthetic", "real"):
        assert [sum(row) for row in classes[kind]] == counts
    assert f"<td>{class_rows(classes)[0][2]}</td>" in text

    bundle = tmp_path / "bundle"
    assert main(["release", "--run-dir", str(own), "--out", str(bundle)]) == 0
    published = b"".join(path.read_bytes() for path in bundle.rglob("*") if path.is_file())
    assert b"NON-PRIVATE" not in published
    hidden = own / "non_private" / "bundle"
    assert main(["release", "--run-dir", str(own), "--out", str(hidden)]) == 2
    assert "which is never released" in capsys.readouterr().err
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "0", "sweep/trial")
    with pytest.raises(ValueError, match="stays out of MLflow"):
        tracker.log_file(page)


def test_an_officer_sees_what_there_is_to_know_before_signing(run, tmp_path, capsys):
    own = Path(shutil.copytree(run, tmp_path / "run"))
    check = ["release", "--check", "--run-dir", str(own)]
    assert main(check) == 0
    told = capsys.readouterr().out
    card = release_card(load(own / "config.yaml"), own)
    for name, value in three_epsilons(card):
        assert re.search(rf"^  {name} +{value}$", told, re.M)
    assert re.search(rf"^  the largest of them +{upward(card['epsilon_trial'])}$", told, re.M)
    assert re.search(r"^  tiny +1 +0 +[\d.]+ ", told, re.M), "the history of the data set"
    assert all(f"  {item}\n" in told for item in card["not_covered"])
    assert "no attack: python -m core inspect" in told
    assert told.count("not audited: python -m core audit") == 2
    assert told.endswith("Against signing\n  nothing found\n")
    found = {"auc": 0.9, "auc_interval": [0.8, 0.95], "epsilon_lower_bound": 3.0}
    write_json(RunFolder(own).inspection, {"membership": {**found, "within_bound": False}})
    assert main(check) == 2
    out, error = capsys.readouterr()
    assert "epsilon is at least 3\n" in out
    assert out.endswith("  the membership attack exceeds what epsilon allows\n")
    assert error == "error: 1 of these speak against signing: read them above\n"
    assert main(["release", "--run-dir", str(own)]) == 2
    assert "--out" in capsys.readouterr().err


def test_other_data_than_the_run_saw_is_not_inspected(run, tmp_path, capsys):
    own = Path(shutil.copytree(run, tmp_path / "run"))
    result = json.loads((own / "evaluation.json").read_text())
    (own / "evaluation.json").write_text(json.dumps(result | {"fingerprint": "0" * 64}))
    assert main(["inspect", "--run-dir", str(own)]) == 2
    assert "differs from what it was" in capsys.readouterr().err
    assert not (own / "non_private").exists()


def test_evaluation_json_says_what_the_scores_rest_on(run):
    result = json.loads((run / "evaluation.json").read_text())
    scored = result["scored"]
    assert scored["num_images"] == 40
    assert scored["num_real_images"] == 1437
    assert scored["classifiers"]["cnn"]["accuracies"] == [result["accuracy"]]
    assert re.fullmatch("[0-9a-f]{64}", scored["real_statistics"])
    cache = Path(os.environ["FETA_SWEEP_TEST_CACHE"])
    raw = {torch.load(path)["digest"] for path in cache.glob("cnn-*.pt")}
    shown = {MasterSecret(b"s" * 32).keyed(digest): digest for digest in raw}
    assert scored["real_statistics"] in shown  # Without the secret it confirms no guess.
    assert scored["real_statistics"] not in raw
    for name in ("fid_cnn", "kid_cnn", "kid_cnn_stddev", "precision_cnn", "recall_cnn"):
        assert result["tags"][name] == "non-private"
        assert isinstance(result[name], float)


def test_a_run_alone_is_released_with_its_owner_s_word(tmp_path: Path):
    """A sweep marks the run that it chose; nothing else may claim its search."""
    tiny_run(tmp_path / "run", **{"privacy.scope": "public"})
    config = load(tmp_path / "run" / "config.yaml")
    for chosen in (False, True):
        if chosen:
            write_json(tmp_path / "run" / "selected.json", {"objective": "accuracy (public)"})
        card = release_card(config, tmp_path / "run")
        assert ("As the owner of the data states" in card["statement"]) is not chosen


def test_what_real_images_decide_is_its_owner_s_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        kept = {"runtime.cache": str(tmp_path / "cache"), "runtime.keep_checkpoints": True}
        tiny_run(tmp_path / "run", **kept)
    finally:
        os.umask(before)
    folders = [tmp_path / "cache", *(tmp_path / "run" / n for n in ("checkpoints", "ledger"))]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [tmp_path / "run" / name for name in ("evaluation.json", "identity.json")]
    assert {path.suffix for path in files} > {".pt", ".npy", ".jsonl", ".json"}
    for path in folders:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    for path in files:
        if path.suffix != ".lock":  # Which says who holds it, no more.
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_nothing_that_leaves_a_run_holds_the_digest_of_its_data(run, released, tmp_path, capsys):
    """Whoever guesses the whole data set could confirm the guess."""
    fingerprint = json.loads((run / "evaluation.json").read_text())["fingerprint"]
    for action in ("show", "verify"):
        assert main(["ledger", action, "--folder", str(run / "ledger")]) == 0
    assert main(["evaluate", "--run-dir", str(run)]) == 0
    told = capsys.readouterr().out.encode()
    files = [path for path in released.rglob("*") if path.is_file()]
    files += [run / name for name in ("config.yaml", "privacy.json", "environment.json", "run.log")]
    names = "".join(path.name for path in run.rglob("*"))
    for content in (told, names.encode(), *(path.read_bytes() for path in files)):
        assert fingerprint[:8].encode() not in content
