"""What a run's dealings with the ledger count, whatever was lost between its starts."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from two_ranks import TINY

from core.__main__ import main
from core.config import Config, load
from core.errors import LedgerError
from core.privacy.ledger.account import Spending, ledger_of_run
from core.privacy.ledger.card import ledger_text
from core.privacy.ledger.file import accept_loss, locked
from core.privacy.ledger.ledger import Ledger
from core.privacy.ledger.notes import beside_secret
from core.privacy.plan.plan import PrivacyPlan, make_plan

STEPS = 200
SETTINGS = TINY | {"training.num_steps": STEPS, "stage_split": 0.0}
DATA = "ab" * 32


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return make_plan(load({}, SETTINGS))


def config_of(folder: Path, **changes: object) -> Config:
    places = {"runtime.ledger": str(folder / "ledger"), "runtime.cache": str(folder / "cache")}
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return load({}, SETTINGS | places | changes)


class Start:
    """One start of a run: it reserves, goes on from `resumed`, and ends without settling."""

    def __init__(
        self,
        folder: Path,
        plan: PrivacyPlan,
        resumed: int = 0,
        run: str = "run",
        data: str = DATA,
        **changes: object,
    ) -> None:
        config, run_dir = config_of(folder, **changes), folder / run
        self.data, where = data, Path(config.runtime.ledger)
        self.spending = Spending(config, plan, where, run, run_dir, run_dir / "charged")
        self.reservation = self.spending.reserve(data, f"trial {run}", resumed=resumed)
        self.spending.remember(data)

    def train(self, until: int, since: int = 0) -> "Start":
        for step in range(since, until):
            if self.spending.begins_block(step):
                self.spending.count(step)
        return self

    def commit(self) -> int:
        return self.spending.commit(self.data, self.reservation)


def entry(folder: Path) -> dict:
    (path,) = (folder / "ledger").glob("*.jsonl")
    (only,) = Ledger.at(path).summary()["entries"]
    return only


def test_an_entry_names_the_folder_of_a_trial_as_tables_do(tmp_path, plan):
    """The identity, by which it is known, is not what tables, folders and MLflow show."""
    config, run_dir = config_of(tmp_path), tmp_path / "sweep" / "trials" / "d03263fe"
    Spending(config, plan, tmp_path / "ledger", "sweep", run_dir, run_dir / "charged").reserve(
        DATA, "identity"
    )
    assert entry(tmp_path)["note"] == "scope trial, trial d03263fe"
    text = ledger_text(Ledger.at(next((tmp_path / "ledger").glob("*.jsonl"))).summary())
    assert "sweep, identity, all, scope trial, trial d03263fe" in text
    shutil.rmtree(tmp_path / "ledger")
    Start(tmp_path / "alone", plan)
    assert entry(tmp_path / "alone")["note"] == "scope trial"


def counter(folder: Path) -> Path:
    (path,) = (folder / "ledger").glob("*.begun")
    return path


def own_counter(folder: Path) -> Path:
    (path,) = (folder / "run" / "charged").glob("*.begun")
    return path


def test_a_run_whose_folder_was_emptied_pays_for_what_it_ran_before(tmp_path, plan):
    Start(tmp_path, plan).train(160)  # Killed.
    shutil.rmtree(tmp_path / "run")
    assert Start(tmp_path, plan).train(20).commit() == 175
    assert entry(tmp_path)["executed_steps"] == 175


@pytest.mark.parametrize("content", [None, "", "many", "-1", "201", "12.5", "\0\0\0"])
def test_all_steps_count_where_the_count_of_an_open_run_is_lost(tmp_path, plan, content, caplog):
    Start(tmp_path, plan).train(160)
    if content is None:
        counter(tmp_path).unlink()
    else:
        counter(tmp_path).write_text(content)
    again = Start(tmp_path, plan).train(20)
    assert "all 200 count" in caplog.text
    assert again.commit() == STEPS
    assert entry(tmp_path)["executed_steps"] == STEPS


def test_the_loss_outlives_a_further_kill(tmp_path, plan):
    Start(tmp_path, plan).train(160)
    counter(tmp_path).unlink()
    Start(tmp_path, plan).train(20)
    assert Start(tmp_path, plan).train(20).commit() == STEPS


def test_a_count_older_than_the_checkpoint_is_none(tmp_path, plan):
    Start(tmp_path, plan).train(20)
    older = counter(tmp_path).read_bytes()
    Start(tmp_path, plan, resumed=20).train(160, since=20)
    counter(tmp_path).write_bytes(older)
    own_counter(tmp_path).unlink()
    assert Start(tmp_path, plan, resumed=150).train(152, since=150).commit() == STEPS


def test_a_count_older_than_that_in_the_runs_folder_does_not_make_steps_fewer(tmp_path, plan):
    """As when the ledger's folder is restored from a copy: its lines are the same."""
    Start(tmp_path, plan).train(20)
    older = counter(tmp_path).read_bytes()
    Start(tmp_path, plan).train(160)
    counter(tmp_path).write_bytes(older)
    assert Start(tmp_path, plan).train(20).commit() == 175
    assert entry(tmp_path)["executed_steps"] == 175


@pytest.mark.parametrize("settled", [False, True])
def test_who_begins_a_trial_anew_ends_the_lease_of_those_before(tmp_path, plan, settled):
    """As a worker that was given up, or the original of a copied run folder."""
    earlier = Start(tmp_path, plan).train(110)
    heir = Start(tmp_path, plan, resumed=100).train(180, since=100)
    if settled:
        assert heir.commit() == STEPS
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    earlier.train(125, since=110)  # Steps that it had noted.
    with pytest.raises(LedgerError, match=r"another process has begun '.*/run' since"):
        earlier.train(126, since=125)
    with pytest.raises(LedgerError, match=r"must be in \[200, 200\]|another process has begun"):
        earlier.commit()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert heir.commit() == heir.commit() == STEPS
    assert entry(tmp_path)["executed_steps"] == STEPS


def test_steps_counted_by_a_version_that_names_no_holder_count(tmp_path, plan):
    start = Start(tmp_path, plan).train(110)
    for path in (counter(tmp_path), own_counter(tmp_path)):
        path.write_text("125")
    assert start.train(130, since=110).commit() == 150


def lose_all_but_the_first_line(folder: Path) -> None:
    (path,) = (folder / "ledger").glob("*.jsonl")
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    accept_loss(path, "disk failure")


def test_an_accepted_loss_does_not_discard_the_count_of_a_run(tmp_path, plan):
    Start(tmp_path, plan).train(160)
    lose_all_but_the_first_line(tmp_path)
    shutil.rmtree(tmp_path / "run")
    assert Start(tmp_path, plan).train(20).commit() == 175


@pytest.mark.parametrize("ended", [True, False])
def test_all_steps_of_a_run_count_whose_charge_an_accepted_loss_took(tmp_path, plan, ended, caplog):
    start = Start(tmp_path, plan).train(160)
    if ended:
        start.commit()
    lose_all_but_the_first_line(tmp_path)
    assert Start(tmp_path, plan, run="another").train(20).commit() == 25
    assert "all 200 count" not in caplog.text
    assert Start(tmp_path, plan).train(20).commit() == STEPS
    assert "all 200 count" in caplog.text


def test_a_count_below_what_was_settled_is_none(tmp_path, plan):
    Start(tmp_path, plan).train(160).commit()
    Start(tmp_path, plan, resumed=150)
    counter(tmp_path).write_text("100")
    assert Start(tmp_path, plan).commit() == STEPS


def test_while_nothing_is_open_the_ledger_itself_knows(tmp_path, plan):
    assert Start(tmp_path, plan).train(60).commit() == 75
    assert not list((tmp_path / "ledger").glob("*.begun"))
    again = Start(tmp_path, plan, resumed=60)
    assert entry(tmp_path)["state"] == "reserved"
    assert again.train(62, since=60).commit() == 75
    assert Start(tmp_path, plan, resumed=62).train(80, since=62).commit() == 100
    assert Start(tmp_path, plan).commit() == 100  # From the beginning: a replay, not fewer steps.
    shutil.rmtree(tmp_path / "run")
    assert Start(tmp_path, plan).commit() == 100


def test_a_checkpoint_that_the_ledger_knows_nothing_of_counts_in_full(tmp_path, plan):
    assert Start(tmp_path, plan, resumed=150).commit() == STEPS


def test_a_finished_run_that_is_resumed_changes_nothing(tmp_path, plan):
    assert Start(tmp_path, plan).train(STEPS).commit() == STEPS
    (path,) = (tmp_path / "ledger").glob("*.jsonl")
    before = path.read_bytes()
    assert Start(tmp_path, plan, resumed=STEPS).commit() == STEPS
    assert Start(tmp_path, plan).train(20).commit() == STEPS
    assert path.read_bytes() == before


def test_a_voided_reservation_begins_at_none(tmp_path, plan):
    start = Start(tmp_path, plan)
    (path,) = (tmp_path / "ledger").glob("*.jsonl")
    with locked(path, notes=[tmp_path / "run" / "charged" / path.stem]) as chain:
        chain.append("void", {"key": asdict(start.reservation.key)})  # By an earlier version.
    assert Start(tmp_path, plan).train(10).commit() == 25


# A ledger that is lost.


@pytest.mark.parametrize("gone", ["*.jsonl", "*.head", "*.lock"])
def test_sources_know_which_ledger_must_be_there(tmp_path, plan, gone):
    """Another run on the same data, whose own folder knows nothing."""
    Start(tmp_path, plan).train(STEPS).commit()
    (path,) = (tmp_path / "ledger").glob("*.jsonl")
    beside_secret(path).unlink()
    for pattern in {"*.jsonl", "*.head", gone}:
        for each in (tmp_path / "ledger").glob(pattern):
            if each.name != "sources.lock":
                each.unlink()
    with pytest.raises(LedgerError, match="no ledger at"):
        Start(tmp_path, plan, run="another")
    assert main(["ledger", "accept-loss", "--file", str(path), "--reason", "disk failure"]) == 0
    Start(tmp_path, plan, run="another").train(STEPS).commit()
    found = Ledger.at(path).summary()
    assert [each["run"] for each in found["entries"]] == ["another"]
    assert len(found["losses"]) == 1


def test_the_folder_of_a_run_knows_of_an_older_ledger(tmp_path, plan):
    Start(tmp_path, plan, run="first").commit()
    older = shutil.copytree(tmp_path / "ledger", tmp_path / "older")
    Start(tmp_path, plan, run="second").commit()
    shutil.rmtree(tmp_path / "ledger")
    older.rename(tmp_path / "ledger")
    (path,) = (tmp_path / "ledger").glob("*.jsonl")
    beside_secret(path).unlink()
    with pytest.raises(LedgerError, match=r"it is shorter than '.*/second/charged/[^/]*' knows;"):
        Start(tmp_path, plan, run="second")
    with pytest.raises(LedgerError, match=r"it is shorter than '.*/second/charged/[^/]*' knows;"):
        ledger_of_run(config_of(tmp_path), tmp_path / "second", DATA)
    assert ledger_of_run(config_of(tmp_path), tmp_path / "first", DATA).verify() > 1


@pytest.mark.parametrize("folder", ["run/charged", "sweep/charged"])
def test_the_mark_of_an_earlier_version_is_known_by_its_name(tmp_path, plan, folder):
    """An empty file named by the digest itself."""
    mark = tmp_path / folder / DATA[:16]
    mark.parent.mkdir(parents=True)
    mark.touch()
    config = config_of(tmp_path)
    shared = tmp_path / "sweep" / "charged"
    spending = Spending(config, plan, tmp_path / "ledger", "run", tmp_path / "run", shared)
    with pytest.raises(LedgerError, match=rf"no ledger at .*'{mark}' knows of it"):
        spending.reserve(DATA, "trial")
    assert not (tmp_path / "ledger").exists()


def test_what_was_never_charged_needs_no_ledger(tmp_path, plan):
    ceiling = config_of(tmp_path, method="non_private")
    free = make_plan(ceiling)
    assert not free.is_private
    run_dir = tmp_path / "ceiling"
    folder = tmp_path / "ledger"
    folder.mkdir()
    spending = Spending(ceiling, free, folder, "ceiling", run_dir, run_dir / "charged")
    spending.remember(DATA)
    assert spending.known_fingerprint() == DATA
    Start(tmp_path, plan)
    spending.remember(DATA)  # Which does not forget that there is a ledger now.
    assert json.loads((folder / "sources.json").read_text()).popitem()[1]["charged"]


def test_what_is_not_charged_does_not_rename_the_family_of_what_was(tmp_path, plan):
    Start(tmp_path, plan).commit()
    ceiling = config_of(tmp_path, method="non_private", dataset__family="patients")
    run_dir = tmp_path / "ceiling"
    free = make_plan(ceiling)
    folder = tmp_path / "ledger"
    Spending(ceiling, free, folder, "ceiling", run_dir, run_dir / "charged").remember(DATA)
    Start(tmp_path, plan, run="another").commit()
    (source,) = json.loads((folder / "sources.json").read_text()).values()
    assert (source["family"], source["charged"]) == (None, True)


def test_sources_of_an_older_version_are_read_and_damaged_ones_named(tmp_path, plan):
    Start(tmp_path, plan)
    path = tmp_path / "ledger" / "sources.json"
    assert path.stat().st_mode & 0o777 == 0o600
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: "cd" * 32}))
    config, run_dir = config_of(tmp_path), tmp_path / "x"
    spending = Spending(config, plan, tmp_path / "ledger", "x", run_dir, run_dir)
    assert spending.known_fingerprint() == "cd" * 32
    for content in ("{", "[]", '{"a": 3}', '{"a": {"b": 1}}'):
        path.write_text(content)
        with pytest.raises(LedgerError, match=r"sources.json' is not as it was written"):
            spending.known_fingerprint()


def as_an_older_version_noted_it(folder: Path) -> None:
    path = folder / "ledger" / "sources.json"
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), DATA)))


def test_a_note_of_an_older_version_alone_tells_of_no_ledger(tmp_path, plan):
    """It wrote the same for a run without privacy."""
    ceiling = config_of(tmp_path, method="non_private")
    (tmp_path / "ledger").mkdir()
    free, where = make_plan(ceiling), tmp_path / "ledger"
    Spending(ceiling, free, where, "c", tmp_path / "c", tmp_path / "c" / "charged").remember(DATA)
    as_an_older_version_noted_it(tmp_path)
    Start(tmp_path, plan).commit()


@pytest.mark.parametrize("kept", [".lock", ".head"])
def test_a_lock_or_head_beside_it_tells_of_one(tmp_path, plan, kept):
    Start(tmp_path, plan).commit()
    as_an_older_version_noted_it(tmp_path)
    (path,) = (tmp_path / "ledger").glob("*.jsonl")
    beside_secret(path).unlink()
    for suffix in {".jsonl", ".lock", ".head"} - {kept}:
        path.with_suffix(suffix).unlink()
    path.with_suffix(kept).rename(path.with_name(DATA[:16] + kept))  # Named as it was then.
    with pytest.raises(LedgerError, match=r"no ledger at|shorter than its head"):
        Start(tmp_path, plan, run="another")


def test_a_ledger_where_earlier_versions_kept_it_is_not_passed_over(tmp_path, plan):
    Start(tmp_path, plan).commit()
    with pytest.raises(LedgerError, match=r"has a ledger '.*', where earlier versions kept it"):
        Start(tmp_path, plan, run="another", runtime__ledger=str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_one_in_the_working_directory_is_not_passed_over_either(tmp_path, plan, monkeypatch):
    """Also where an upgrade has begun a second one already."""
    monkeypatch.chdir(tmp_path)
    Start(tmp_path, plan, runtime__ledger="runs/ledger").commit()  # Itself it does not refuse.
    moved = {"runtime__cache": str(tmp_path / "elsewhere" / "cache")}
    with pytest.raises(LedgerError, match=r"'runs/ledger/.*' from there to '.*/ledger'"):
        Start(tmp_path, plan, run="another", **moved)
    assert not (tmp_path / "ledger").exists()
    (tmp_path / "runs").rename(tmp_path / "away")
    Start(tmp_path, plan, run="another", **moved).commit()
    (tmp_path / "away").rename(tmp_path / "runs")
    before = entry(tmp_path)
    with pytest.raises(LedgerError, match=r"move the one away whose charges '.*' holds too"):
        Start(tmp_path, plan, run="third", **moved)
    assert entry(tmp_path) == before
    moved["runtime__ledger"] = str(tmp_path / "runs" / "ledger")  # As the message asks.
    Start(tmp_path, plan, run="third", **moved).commit()


# Data sets that charge together.


def test_a_family_charges_one_ledger_and_the_card_of_each_run_finds_it(tmp_path, plan):
    family = {"dataset__family": "patients"}
    Start(tmp_path, plan, run="whole", **family).train(STEPS).commit()
    fewer = replace(plan, num_examples=1436)
    less = {**family, "dataset__num_examples": 1436}
    Start(tmp_path, fewer, run="less", data="cd" * 32, **less).train(STEPS).commit()
    ledger = ledger_of_run(config_of(tmp_path, **family), tmp_path / "whole", DATA)
    summary = ledger.summary()
    assert [each["run"] for each in summary["entries"]] == ["whole", "less"]
    alone = summary["entries"][0]["epsilon"]
    assert alone < summary["epsilon_committed_and_reserved"] < 2 * alone


def test_a_family_is_named_before_the_first_run(tmp_path, plan):
    Start(tmp_path, plan).commit()
    with pytest.raises(LedgerError, match=r"dataset.family='patients', but .* with None before"):
        Start(tmp_path, plan, run="another", dataset__family="patients")
    Start(tmp_path, plan, run="third", data="ef" * 32, dataset__family="patients").commit()
    with pytest.raises(LedgerError, match=r"dataset.family=None, but .* with 'patients' before"):
        Start(tmp_path, plan, run="fourth", data="ef" * 32)


def test_a_family_is_not_named_beside_a_ledger_that_the_sources_do_not_know(tmp_path, plan):
    Start(tmp_path, plan).commit()
    (tmp_path / "ledger" / "sources.json").unlink()
    with pytest.raises(LedgerError, match=r"'patients', but this data set was charged alone"):
        Start(tmp_path, plan, run="another", dataset__family="patients")


def test_show_warns_where_one_path_was_read_as_several_data_sets(tmp_path, plan, capsys):
    folder = tmp_path / "pictures"
    for label, data in (("label", DATA), ("other", "cd" * 32)):
        changes = {"dataset__path": str(folder), "dataset__label_column": label}
        Start(tmp_path, plan, run=label, data=data, **changes).commit()
        assert main(["ledger", "show", "--folder", str(tmp_path / "ledger")]) == 0
        warned = f"warning: '{folder}' was read as several data sets" in capsys.readouterr().out
        assert warned == (label == "other")
