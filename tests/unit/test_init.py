"""A folder of one's own: what lies in it, what is proposed for it, and what its owner must say."""

import math
import re
import stat
from pathlib import Path

import numpy as np
import pytest
from idx_files import write_idx
from picture_files import picture, write_folder
from published_files import write_camelyon17, write_parquet

from core.__main__ import main
from core.commands.probe import StageSeconds
from core.commands.proposal import propose
from core.commands.survey import Survey, survey
from core.config import DatasetConfig, load
from core.errors import DataError
from core.privacy.accounting.rounding import upward
from core.privacy.plan.plan import estimated_noise_multiplier, make_plan
from sweep.config.sweep import load_sweep
from sweep.run import main as run_main

NAMES = ("cat", "dog", "owl", "yak")


def write_photos(folder: Path, each: int = 30) -> None:
    """Colour JPEGs of several sizes in four classes, each with a bar at another height."""
    random = np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        for number in range(each):
            pixels = random.integers(0, 120, (40, 44 + number % 3, 3))
            pixels[8 * label : 8 * label + 8] = 220
            picture(folder / name / f"{number:03}.jpg", pixels)


def surveyed(folder: Path, **settings: object) -> Survey:
    return survey(folder, settings, lambda _: None)


def test_photographs_in_folders_of_classes(tmp_path):
    write_photos(tmp_path / "photos")
    told: list[dict] = []
    found = survey(tmp_path / "photos", {}, told.append)
    assert (found.config.name, found.config.channels, found.class_names) == (
        "image_folder",
        3,
        NAMES,
    )
    assert found.config.num_examples == len(found.train) == 120 - len(found.test)
    assert sum(found.sizes.values()) == 120
    assert set(found.sizes) == {(44, 40), (45, 40), (46, 40)}
    picture = found.picture(16)
    assert picture.images.shape == (32, 3, 16, 16)
    assert picture.labels.bincount().tolist() == [8] * 4
    assert told[0] == {"stage": "reading", "step": 0, "total": 120}


def test_of_large_photographs_no_more_is_kept_than_a_run_sees(tmp_path):
    for number in range(4):
        pixels = np.full((700, 900, 3), 250 * (number % 2))
        picture(tmp_path / "train" / "a" / f"{number}.png", pixels)
        picture(tmp_path / "test" / "a" / f"{number}.png", pixels)
    found = surveyed(tmp_path)
    assert {image.shape for image, _ in found.samples} == {(3, 512, 512)}
    assert found.sizes == {(900, 700): 8}
    assert found.picture(32).images.float().mean((1, 2, 3)).tolist() == [0, 250, 0, 250]


def test_an_archive_unpacked_into_a_folder_with_splits_of_other_names(tmp_path):
    for split in ("Training_set", "Valid"):
        write_folder(tmp_path / "download" / "pets" / split, classes=3)
    (tmp_path / "download" / "__MACOSX").mkdir()
    found = surveyed(tmp_path / "download")
    assert found.config.path == str(tmp_path / "download" / "pets")
    assert (found.config.channels, found.config.num_classes) == (1, 3)
    assert (len(found.train), len(found.test)) == (60, 60)


def test_a_single_class_is_not_taken_for_a_folder_around_others(tmp_path):
    write_folder(tmp_path, classes=1)
    assert surveyed(tmp_path).class_names == ("class0",)


def test_parquet_with_columns_of_other_names(tmp_path):
    for split, number in (("train", 8), ("test", 4)):
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        labels = [n % 4 for n in range(number)]
        write_parquet(path, labels, image="img", label="fine", names=list(NAMES))
    found = surveyed(tmp_path)
    assert (found.config.image_column, found.config.label_column) == ("img", "fine")
    assert found.class_names == NAMES
    assert (len(found.train), len(found.test)) == (8, 4)


@pytest.mark.parametrize("first", [0, 1])
def test_idx_whose_labels_begin_with_0_or_1(tmp_path, first):
    labels = {"train_labels": first + np.arange(30) % 3, "test_labels": first + np.arange(12) % 3}
    write_idx(tmp_path, **labels)
    found = surveyed(tmp_path)
    assert (found.config.name, found.config.channels, found.config.num_classes) == ("idx", 1, 3)
    assert found.class_names == tuple(str(first + label) for label in range(3))


def test_wilds_is_known_by_its_table_and_patches(tmp_path):
    write_camelyon17(tmp_path)
    found = surveyed(tmp_path)
    assert (found.config.name, found.class_names) == ("camelyon17", ("no tumor", "tumor"))


@pytest.mark.parametrize("content", [None, b"no image"])
def test_what_cannot_be_read_is_named_before_anything_is_planned(tmp_path, content):
    if content is None:
        with pytest.raises(DataError, match=r"holds neither a folder for each class"):
            surveyed(tmp_path)
        return
    write_folder(tmp_path)
    (tmp_path / "class1" / "003.png").write_bytes(content)
    with pytest.raises(DataError, match=r"003\.png' is no readable image"):
        surveyed(tmp_path)


def test_a_class_without_images_is_told_before_any_is_read(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [0, 3] * 4)
    with pytest.raises(DataError, match=r"class 1, 2 of .* has no training image"):
        survey(tmp_path, {}, lambda _: pytest.fail("images are read"))


def test_a_table_beside_pictures_does_not_make_them_parquet_files(tmp_path):
    write_folder(tmp_path)
    write_parquet(tmp_path / "metadata.parquet", [0, 1])
    assert surveyed(tmp_path).config.name == "image_folder"
    write_parquet(tmp_path / "data" / "train.parquet", [0, 1] * 4)
    write_parquet(tmp_path / "data" / "test.parquet", [0, 1] * 4)
    assert surveyed(tmp_path).config.name == "parquet"


def test_images_that_are_all_held_out_for_testing_are_too_few(tmp_path):
    picture(tmp_path / "a" / "1.png", np.zeros((6, 6)))  # Which falls into the fifth.
    with pytest.raises(DataError, match="holds no training image of 1 or 3 channels"):
        surveyed(tmp_path)


def test_nothing_is_written_until_the_owner_publishes_the_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos")
    command = ["init", "photos", "--epsilon", "10", "--minutes", "0.05"]
    assert main(command) == 2
    told = capsys.readouterr()
    assert re.search(r"^cat +\d+ +\d+$", told.out, re.M)
    assert "give --publish-counts, or type dataset.num_examples=NUMBER" in told.err
    assert not [*tmp_path.glob("*.yaml")]
    grid = tmp_path / "runs" / "init" / "photos-epsilon10" / "non_private" / "real_images.png"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (grid.parent, grid)]
    assert modes == [0o700, 0o600]
    typed = ["dataset.num_classes=4", "dataset.num_examples=7"]
    assert main([*command, *typed]) == 2
    assert re.search(r"dataset\.num_examples=7, but .* holds \d+ training", capsys.readouterr().err)
    typed = ["seed=3", "model.attention_sizes=[8]"]
    assert main([*command, "--publish-counts", "--out", "my.yaml", *typed]) == 0
    told = capsys.readouterr().out
    assert re.search(
        r"^easy +\d+ steps on 2 central images a class, .* epsilon [\d.]+$", told, re.M
    )
    for word in ("noise ", "epsilon ", "time ", "memory ", "too small"):
        assert re.search(rf"^{word}", told, re.M), word
    config = load("my.yaml")
    count = config.dataset.num_examples
    assert 0.9 / (count * math.log(count)) < config.privacy.target_delta
    assert config.privacy.target_delta <= 1 / (count * math.log(count))
    assert config.model.attention_sizes == (8,)
    assert (config.seed, config.dataset.image_size, config.dataset.num_classes) == (3, 32, 4)
    lines = (tmp_path / "my.yaml").read_text().splitlines()
    values = [number for number, line in enumerate(lines) if re.match(r" *\w+: ", line)]
    assert all(lines[number - 1].lstrip().startswith("#") for number in values)
    assert load_sweep("my_sweep.yaml", {}).run == config
    assert main([*command, "--publish-counts", "--out", "my.yaml"]) == 2  # It is there.


def test_one_command_plans_a_sweep_and_goes_on_with_what_it_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sweep.search.feasible._POINTS", 2)  # Solved in a quarter of the time.
    write_photos(tmp_path / "photos")
    command = ["--data", "photos", "--epsilon", "10", "--minutes", "0.05", "--plan"]
    command.append("dataset.image_size=8")  # Which is probed sooner.
    assert run_main(command) == 2
    assert run_main([*command, "--publish-counts"]) == 0
    assert "sweep photos-epsilon10: 4 trials" in capsys.readouterr().out
    assert run_main(command) == 0
    assert "goes on with runs/init/photos-epsilon10_sweep.yaml" in capsys.readouterr().out
    assert run_main(["--data", "photos", "--plan"]) == 2
    assert "--epsilon is missing" in capsys.readouterr().err
    for flags in (["--epsilon", "10"], ["--minutes", "5"], ["--gpu-hours", "1"]):
        assert run_main([*flags, "--plan"]) == 2
        assert "need --data FOLDER" in capsys.readouterr().err


def test_another_folder_of_the_same_name_is_not_taken_for_the_first(tmp_path, monkeypatch, capsys):
    """Nor is one whose name differs in what a sweep's name cannot hold."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "one" / "my photos" / "photos")
    write_photos(tmp_path / "two" / "my+photos")
    command = ["--epsilon", "10", "--minutes", "0.05", "--publish-counts", "--plan"]
    command += ["dataset.image_size=8", "--data"]
    for _ in range(2):  # Its images lie in a folder within it.
        assert run_main([*command, "one/my photos"]) == 0
    capsys.readouterr()
    assert run_main([*command, "two/my+photos"]) == 2
    told = capsys.readouterr()
    assert "goes on with" not in told.out
    assert f"written for '{tmp_path}/one/my photos/photos', not for '{tmp_path}/two/my+" in told.err


def test_the_plan_tells_what_is_spent_on_moments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    labels = {"train_labels": np.arange(240) % 2, "test_labels": np.arange(20) % 2}
    images = {"train_images": random.integers(0, 256, (240, 8, 8))}
    images["test_images"] = images["train_images"][:20]
    write_idx(tmp_path / "grey", **images, **labels)
    command = ["init", "grey", "--epsilon", "10", "--minutes", "0.05", "--publish-counts"]
    assert main(command) == 0
    plan, told = make_plan(load("grey-epsilon10.yaml")), capsys.readouterr().out
    assert (
        f"moments of 1 cluster a class, which alone spend epsilon {upward(plan.epsilon_central)}"
        in told
    )
    assert "central image" not in told


def test_without_any_argument_the_quickstart_runs(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "sweep.search.feasible.print_plan", lambda sweep, _: seen.append(sweep.name)
    )
    assert run_main(["--plan"]) == 0
    assert seen == ["quickstart"]


FACTS = DatasetConfig(name="idx", path="x", image_size=32, channels=3, num_classes=4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("count", [4, 100, 5000, 60_000, 1_000_000])
@pytest.mark.parametrize("side", [4, 28, 64])
def test_a_proposal_is_valid_whatever_the_data(count, device, side):
    facts = FACTS.model_copy(update={"num_examples": count, "image_size": side})
    proposal = propose(facts, NAMES, 10.0, device)
    config = proposal.in_time(600, StageSeconds(0.01, 0.5, 0.01)).config
    batch = config.private_training.expected_batch_size
    assert config.private_steps * batch <= 155 * count or config.training.num_steps == 10
    assert config.central_images.expected_batch_size == count


@pytest.mark.parametrize(
    ("changes", "kind", "clusters"),
    [
        ({"channels": 1}, "moments", 20),
        ({"channels": 1, "num_examples": 1437, "num_classes": 10}, "moments", 1),
        ({"channels": 1, "num_examples": 300}, "mean", 1),
        ({"channels": 1, "image_size": 64}, "mean", 1),
        ({}, "mean", 1),
    ],
)
def test_it_starts_from_moments_where_these_were_measured(changes, kind, clusters, tmp_path):
    facts = FACTS.model_copy(update={"num_examples": 60_000, **changes})
    proposal = propose(facts, NAMES, 10.0, "cpu")
    central = proposal.config.central_images
    assert (central.kind, central.num_clusters) == (kind, clusters)
    assert proposal.config.uses_moments is (kind == "moments")
    (tmp_path / "run.yaml").write_text(proposal.run_text())
    (tmp_path / "sweep.yaml").write_text(proposal.sweep_text("x", "run.yaml", 2, False))
    sweep = load_sweep(tmp_path / "sweep.yaml", {})
    assert sweep.run == proposal.config
    count = "num_clusters" if kind == "moments" else "per_class"
    assert next(iter(sweep.search_space)) == f"central_images.{count}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "0"], "--minutes=0 must be positive"),
        (["--gpu-hours", "4", "runtime.device=cpu"], "--gpu-hours=4, but there is no GPU here"),
        (["--epsilon", "0"], "--epsilon=0 must be positive and finite"),
        (["--epsilon=-1"], "--epsilon=-1 must be positive and finite"),
        (["--epsilon", "nan"], "--epsilon=nan must be positive and finite"),
        (["privacy.target_epsilon=1"], "privacy.target_epsilon is what --epsilon says"),
        (["dataset.path=x"], "dataset.path is what the folder says"),
        (["stage_spilt=0.3"], "unknown key 'stage_spilt'; did you mean 'stage_split'?"),
        ([], "no folder at dataset.path="),
    ],
)
def test_what_nothing_can_be_made_of_is_refused_in_one_line_before_anything_is_read(
    flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "nowhere", "--epsilon", "10", *flags]) == 2
    assert run_main(["--data", "nowhere", "--epsilon", "10", *flags]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert [line.count(message) for line in told.err.splitlines()] == [1, 1]


@pytest.mark.parametrize(
    "key",
    [
        *("storage_path=3", "storage_path=ftp://a/b", "name=my sweep", "num_trials=0"),
        "search_spice.low=1",
    ],
)
def test_a_sweeps_key_is_refused_before_an_image_is_read(key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", each=2)
    assert run_main(["--data", "photos", "--epsilon", "10", "--publish-counts", key]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    named = key.partition("=")[0]
    assert re.match(f"error: ({named}=|unknown key '{named}')", told.err)
    assert [*tmp_path.iterdir()] == [tmp_path / "photos"]


def test_what_is_too_small_is_said_with_the_reason_and_what_is_large_is_not():
    def reasons(count: int, epsilon: float) -> str:
        facts = FACTS.model_copy(update={"num_examples": count})
        proposal = propose(facts, NAMES, epsilon, "cpu").changed("training.num_steps", 100, "")
        return "; ".join(proposal.too_small(make_plan(proposal.config)))

    assert reasons(20_000, 10.0) == ""
    few = reasons(200, 1.0)
    assert "a pixel of a central image has noise" in few
    assert "DP-SGD's noise over batch is" in few


def test_steps_fill_the_time_that_is_stated():
    proposal = propose(FACTS.model_copy(update={"num_examples": 60_000}), NAMES, 10.0, "cpu")
    config = proposal.in_time(1000, StageSeconds(0.1, 1.0, 0.1)).config
    spent = config.warm_up_steps * 0.1 + config.private_steps * 1.0
    assert 0.9 * 600 <= spent <= 600  # 2,000 images take 200 s; a fifth is for scores.
    assert estimated_noise_multiplier(config) > 0
