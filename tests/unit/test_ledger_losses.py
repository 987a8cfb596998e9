"""A ledger that is lost, cut, older or another than what was noted of it; and a loss accepted."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from core.__main__ import main
from core.errors import LedgerError
from core.privacy.ledger.file import accept_loss
from core.privacy.ledger.ledger import Ledger
from core.privacy.ledger.names import charged_to, ledger_path
from core.privacy.ledger.notes import beside_secret
from core.privacy.ledger.sources import Source, Sources
from core.privacy.ledger.terms import Event, Key, Terms

TERMS = Terms("ab" * 32, 1_000, 1e-5, "zero_out", None)
DP_SGD = Event("dp_sgd", 0.05, 8.0, 100)


def key(trial: str) -> Key:
    return Key("sweep", trial, "all", 0, 100)


def begun(folder: Path, note: Path, trials: int = 2) -> Ledger:
    ledger = Ledger.open(folder, TERMS, notes=[note])
    for number in range(trials):
        ledger.reserve(key(str(number)), [DP_SGD])
    return ledger


def forget_all_but(ledger: Ledger, note: Path, kept: str) -> None:
    """Leaves one witness alone of those that tell that there was a ledger."""
    path = ledger.path
    witnesses = {
        "note beside the secret": beside_secret(path),
        "note of a run": note,
        "lock": path.with_suffix(".lock"),
        "head": path.with_suffix(".head"),
    }
    path.unlink()
    for name, witness in witnesses.items():
        if name != kept:
            witness.unlink()


@pytest.mark.parametrize("witness", ["note beside the secret", "note of a run", "lock", "head"])
@pytest.mark.parametrize("version", ["this", "an older one"])
def test_whatever_knows_of_a_lost_ledger_keeps_it_from_being_begun_anew(tmp_path, witness, version):
    note = tmp_path / "run" / "note"
    ledger = begun(tmp_path / "ledger", note)
    if version != "this":  # Which left lock and run's note empty.
        for path in (ledger.path.with_suffix(".lock"), note):
            path.write_bytes(b"")
    forget_all_but(ledger, note, witness)
    with pytest.raises(LedgerError, match=r"no ledger at|shorter than its head") as refused:
        Ledger.open(tmp_path / "ledger", TERMS, notes=[note])
    assert f"accept-loss --file '{ledger.path}'" in str(refused.value)
    assert not ledger.path.exists()


@pytest.mark.parametrize("witness", ["note beside the secret", "lock", "head", "sources.json"])
@pytest.mark.parametrize("action", ["show", "verify"])
def test_the_command_tells_of_a_lost_ledger_beside_another(tmp_path, capsys, witness, action):
    folder, note = tmp_path / "ledger", tmp_path / "run" / "note"
    Ledger.open(folder, replace(TERMS, fingerprint="cd" * 32))
    ledger = begun(folder, note)
    Sources(folder).remember("a", Source(TERMS.fingerprint, charged=witness == "sources.json"))
    forget_all_but(ledger, note, witness)
    command = ["ledger", action, "--folder", str(folder)]
    assert main(command) == 2
    told = capsys.readouterr()
    assert len(re.findall(r"^data set ", told.out, re.M)) == 1
    assert re.match(r"error: (no ledger at|the ledger) ", told.err)
    assert f"accept-loss --file '{ledger.path}'" in told.err


def test_a_folder_that_is_gone_is_known_by_the_notes_and_not_made_again(tmp_path):
    note = tmp_path / "run" / "note"
    begun(tmp_path / "ledger", note)
    shutil.rmtree(tmp_path / "ledger")
    with pytest.raises(LedgerError, match=r"no ledger at .* knows of it"):
        Ledger.open(tmp_path / "ledger", TERMS)
    assert not (tmp_path / "ledger").exists()
    begun(tmp_path / "another", tmp_path / "another_run" / "note")  # In another place, on purpose.


def test_what_other_knowledge_tells_of_must_be_there(tmp_path):
    with pytest.raises(LedgerError, match="no ledger at"):
        Ledger.open(tmp_path / "ledger", TERMS, known=True)
    assert not (tmp_path / "ledger").exists()


Harm = Callable[[Path, dict[str, bytes]], None]


def older_copy(path: Path, early: dict[str, bytes]) -> None:
    for name, content in early.items():
        path.with_name(name).write_bytes(content)


def first_line(path: Path, _: dict[str, bytes]) -> None:
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    path.with_suffix(".head").unlink()


def another_chain(path: Path, _: dict[str, bytes]) -> None:
    other = begun(path.parent / "other", path.parent / "other" / "note", trials=5)
    for suffix in (".jsonl", ".head"):
        shutil.copy(other.path.with_suffix(suffix), path.with_suffix(suffix))


@pytest.mark.parametrize("harm", [older_copy, first_line, another_chain])
@pytest.mark.parametrize("witness", ["beside the secret", "of a run", "both"])
def test_a_shorter_or_another_chain_than_noted_is_refused(tmp_path, harm: Harm, witness):
    note = tmp_path / "run" / "note"
    ledger = begun(tmp_path / "ledger", note, trials=1)
    early = {p.name: p.read_bytes() for p in ledger.path.parent.iterdir() if p.suffix != ".lock"}
    ledger.reserve(key("late"), [DP_SGD])
    {"beside the secret": note, "of a run": beside_secret(ledger.path)}.get(
        witness, tmp_path / "none"
    ).unlink(missing_ok=True)
    harm(ledger.path, early)
    before = ledger.path.read_bytes()
    for act in (
        lambda: Ledger.open(tmp_path / "ledger", TERMS, notes=[note]),
        lambda: Ledger.at(ledger.path, [note]),
        ledger.summary,
        lambda: ledger.reserve(key("more"), [DP_SGD]),
    ):
        with pytest.raises(
            LedgerError, match=r"edited or truncated: (it is (shorter|another)|its head)"
        ):
            act()
    assert ledger.path.read_bytes() == before


def test_a_file_cut_to_its_first_line_is_found_without_any_note(tmp_path):
    """By the lock, which knows that there was a head."""
    note = tmp_path / "run" / "note"
    ledger = begun(tmp_path / "ledger", note)
    for place in (note, beside_secret(ledger.path)):
        place.unlink()
    first_line(ledger.path, {})
    with pytest.raises(LedgerError, match="its head is gone"):
        Ledger.open(tmp_path / "ledger", TERMS)


def test_a_note_may_lag_behind(tmp_path):
    """As after a death between line and note, or where another host wrote last."""
    note = tmp_path / "run" / "note"
    ledger = begun(tmp_path / "ledger", note, trials=1)
    early = {place: place.read_bytes() for place in (note, beside_secret(ledger.path))}
    ledger.reserve(key("late"), [DP_SGD])
    for place, content in early.items():
        place.write_bytes(content)
    assert Ledger.open(tmp_path / "ledger", TERMS, notes=[note]).verify() == 3
    note.write_bytes(b"")  # An older version only touched it.
    assert Ledger.open(tmp_path / "ledger", TERMS, notes=[note]).verify() == 3


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"sequence": "x"}', b'{"sequence": 1}', b"1"])
def test_a_damaged_note_is_named(tmp_path, content):
    ledger = begun(tmp_path / "ledger", tmp_path / "note")
    (tmp_path / "note").write_bytes(content)
    with pytest.raises(LedgerError, match=r"note '.*/note' of its last line is not as it was"):
        Ledger.at(ledger.path, [tmp_path / "note"])


def test_a_ledger_of_an_older_version_goes_on(tmp_path):
    """Without notes, and with a lock that says nothing."""
    ledger = begun(tmp_path / "ledger", tmp_path / "note")
    beside_secret(ledger.path).unlink()
    ledger.path.with_suffix(".lock").write_bytes(b"")
    again = Ledger.open(tmp_path / "ledger", TERMS)
    again.reserve(key("more"), [DP_SGD])
    assert again.verify() == 4
    assert again.summary()["losses"] == []


def test_without_a_folder_for_it_the_log_says_that_nothing_is_noted(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FETA_SWEEP_SECRET_FILE", str(tmp_path / "master.secret"))
    (tmp_path / "ledgers").write_text("no folder")
    begun(tmp_path / "ledger", tmp_path / "note")
    assert "no note of the ledger beside the master secret" in caplog.text


def test_notes_and_ledger_are_their_owners_alone(tmp_path):
    before = os.umask(0)
    try:
        ledger = begun(tmp_path / "ledger", tmp_path / "run" / "note")
    finally:
        os.umask(before)
    for path in (*ledger.path.parent.iterdir(), tmp_path / "run" / "note"):
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert beside_secret(ledger.path).stat().st_mode & 0o777 == 0o600
    assert ledger.path.parent.stat().st_mode & 0o777 == 0o700


# A loss that the owner accepts.


@pytest.mark.parametrize("harm", [older_copy, first_line, another_chain])
def test_an_accepted_loss_is_stated_for_ever(tmp_path, harm: Harm):
    note = tmp_path / "run" / "note"
    ledger = begun(tmp_path / "ledger", note, trials=1)
    early = {p.name: p.read_bytes() for p in ledger.path.parent.iterdir() if p.suffix != ".lock"}
    ledger.reserve(key("late"), [DP_SGD])
    harm(ledger.path, early)
    kept = len(ledger.path.read_bytes().splitlines())
    assert accept_loss(ledger.path, "the  disk\nfailed") == kept
    again = Ledger.open(tmp_path / "ledger", TERMS, notes=[note])
    again.reserve(key("more"), [DP_SGD])
    assert [loss["reason"] for loss in again.summary()["losses"]] == ["the disk failed"]
    assert again.verify() == kept + 2
    # What is lost after that is refused again.
    lines = again.path.read_bytes().splitlines(keepends=True)
    again.path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(LedgerError, match="edited or truncated"):
        Ledger.at(again.path)


def files_of(ledger: Ledger) -> dict[str, bytes]:
    """A backup of the ledger and its head."""
    suffixes = (".jsonl", ".head")
    return {ledger.path.stem + s: ledger.path.with_suffix(s).read_bytes() for s in suffixes}


def refused(ledger: Ledger, *notes: Path) -> bool:
    try:
        Ledger.at(ledger.path, notes)
    except LedgerError as error:
        return bool(re.search("it is (shorter|another)", str(error)))
    return False


def test_a_loss_of_a_host_whose_clock_is_ahead_explains_no_later_rollback(tmp_path, monkeypatch):
    """Its line has a later time than all that is noted until then."""
    note = tmp_path / "run" / "note"
    ledger = begun(tmp_path / "ledger", note)

    class Ahead(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2222, 1, 1, tzinfo=tz)

    with monkeypatch.context() as patch:
        patch.setattr("core.privacy.ledger.file.datetime", Ahead)
        accept_loss(ledger.path, "fire")
    ledger.reserve(key("after the loss"), [DP_SGD])
    early = files_of(ledger)
    ledger.reserve(key("late"), [DP_SGD])
    older_copy(ledger.path, early)
    assert refused(ledger, note)
    beside_secret(ledger.path).unlink()
    assert refused(ledger, note)


@pytest.mark.parametrize("between", [0, 1])
def test_a_copy_from_before_an_accepted_loss_is_refused(tmp_path, between):
    """It lacks the loss that is noted, though it may hold an earlier one."""
    note = tmp_path / "run" / "note"
    ledger = begun(tmp_path / "ledger", note, trials=3)
    if between:
        accept_loss(ledger.path, "fire")
    ledger.reserve(key("more"), [DP_SGD])
    early = files_of(ledger)
    first_line(ledger.path, {})
    accept_loss(ledger.path, "water")
    assert not refused(ledger, note)  # The owner has accepted what the older note misses.
    ledger.reserve(key("again"), [DP_SGD])
    older_copy(ledger.path, early)
    # The note beside the secret knows of all losses.
    assert refused(ledger)
    assert refused(ledger, note)


def test_a_note_that_is_begun_after_a_loss_knows_the_losses_whose_lines_are_gone(tmp_path):
    """So that no copy from before the loss passes where nothing lies beside the secret."""
    ledger = begun(tmp_path / "ledger", tmp_path / "note", trials=2)
    accept_loss(ledger.path, "fire")
    early = files_of(ledger)
    ledger.path.unlink()
    ledger.path.with_suffix(".head").unlink()
    accept_loss(ledger.path, "water")
    late = tmp_path / "late" / "note"
    begun(tmp_path / "ledger", late, trials=1)
    beside_secret(ledger.path).unlink()
    older_copy(ledger.path, early)
    assert refused(ledger, late)


def test_growth_after_a_loss_cannot_be_rolled_back(tmp_path):
    note = tmp_path / "run" / "note"
    ledger = begun(tmp_path / "ledger", note, trials=3)
    first_line(ledger.path, {})
    accept_loss(ledger.path, "fire")
    early = files_of(ledger)
    again = begun(tmp_path / "ledger", tmp_path / "another" / "note", trials=9)
    older_copy(ledger.path, early)
    assert refused(again)
    assert refused(again, note)
    beside_secret(ledger.path).unlink()
    assert refused(again, tmp_path / "another" / "note")
    # A second loss, which no note knows of, explains what all of them miss.
    accept_loss(ledger.path, "water")
    assert not refused(again, note, tmp_path / "another" / "note")


def test_a_note_of_an_earlier_version_is_explained_by_a_later_loss_alone(tmp_path):
    note = tmp_path / "run" / "note"
    ledger = begun(tmp_path / "ledger", note, trials=3)
    early = files_of(ledger)
    ledger.reserve(key("late"), [DP_SGD])
    for place in (note, beside_secret(ledger.path)):
        content = json.loads(place.read_text())
        del content["losses"]
        place.write_text(json.dumps(content))
    older_copy(ledger.path, early)
    assert refused(ledger, note)
    accept_loss(ledger.path, "fire")
    assert not refused(ledger, note)


@pytest.mark.parametrize("gone", ["file", "folder"])
def test_after_the_loss_of_a_whole_ledger_the_next_run_begins_it(tmp_path, gone):
    note = tmp_path / "run" / "note"
    ledger = begun(tmp_path / "ledger", note)
    if gone == "file":
        ledger.path.unlink()
    else:
        shutil.rmtree(tmp_path / "ledger")
    assert accept_loss(ledger.path, "deleted by mistake") == 0
    with pytest.raises(LedgerError, match="holds an accepted loss alone: the next run"):
        Ledger.at(ledger.path)
    again = Ledger.open(tmp_path / "ledger", TERMS, notes=[note], known=True)
    assert again.reserve(key("more"), [DP_SGD])
    assert len(again.summary()["losses"]) == 1
    assert Ledger.at(ledger.path, [note]).terms == TERMS
    with pytest.raises(LedgerError, match=r"^num_examples=999, but"):
        Ledger.open(tmp_path / "ledger", replace(TERMS, num_examples=999))


def test_the_lines_before_an_edited_one_still_count(tmp_path):
    ledger = begun(tmp_path / "ledger", tmp_path / "note", trials=3)
    whole = ledger.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    edited = b"".join([*lines[:2], lines[2].replace(b"100", b"101"), lines[3]])
    ledger.path.write_bytes(edited)
    assert accept_loss(ledger.path, "edited") == 2
    assert ledger.path.read_bytes().startswith(b"".join(lines[:2]))
    (aside,) = ledger.path.parent.glob("*.lost-*")
    assert aside.read_bytes() == edited
    assert [entry["trial"] for entry in ledger.summary()["entries"]] == ["0"]


def test_a_loss_needs_a_reason_and_the_name_of_a_ledger(tmp_path, capsys):
    path = ledger_path(tmp_path, TERMS.fingerprint)
    assert main(["ledger", "accept-loss", "--file", str(path)]) == 2
    assert "--reason='' is refused" in capsys.readouterr().err
    assert main(["ledger", "accept-loss", "--reason", "x"]) == 2
    assert "--file" in capsys.readouterr().err
    assert main(["ledger", "accept-loss", "--reason", "x", "--file", str(tmp_path / "x")]) == 2
    assert "0123456789abcdef.jsonl" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_loss_is_accepted_of_what_nothing_knows(tmp_path, capsys):
    path = tmp_path / "ledger" / ("0" * 16 + ".jsonl")
    assert main(["ledger", "accept-loss", "--file", str(path), "--reason", "fire"]) == 2
    assert "nothing knows of this one" in capsys.readouterr().err
    assert not path.parent.exists()


@pytest.mark.parametrize("empty", [True, False])
def test_a_loss_of_which_a_runs_note_alone_tells_can_be_accepted(tmp_path, empty):
    note = tmp_path / "run" / "note"
    ledger = begun(tmp_path / "ledger", note)
    shutil.rmtree(tmp_path / "ledger")
    beside_secret(ledger.path).unlink()
    if empty:  # Of an older version.
        note.write_bytes(b"")
    with pytest.raises(LedgerError, match="knows of it"):
        Ledger.open(tmp_path / "ledger", TERMS, notes=[note])
    assert accept_loss(ledger.path, "fire") == 0
    assert Ledger.open(tmp_path / "ledger", TERMS, notes=[note]).verify() == 2


def test_show_tells_of_losses_and_of_all_ledgers_beside_a_damaged_one(tmp_path, capsys):
    ledger = begun(tmp_path, tmp_path / "note")
    damaged = Ledger.open(tmp_path, replace(TERMS, fingerprint="cd" * 32))
    damaged.path.write_text("{}\n")
    assert main(["ledger", "accept-loss", "--file", str(ledger.path), "--reason", "fire"]) == 0
    assert "what still verifies is kept" in capsys.readouterr().out
    assert main(["ledger", "show", "--folder", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "fire" in shown.out
    assert "edited or truncated" in shown.err


# Several data sets that charge together.


def test_data_sets_of_a_family_share_ledger_and_budget_whatever_their_size(tmp_path):
    account = charged_to("ab" * 32, "patients")
    assert account == charged_to("cd" * 32, "patients") != charged_to("cd" * 32, "others")
    assert charged_to("cd" * 32, None) == "cd" * 32
    terms = replace(TERMS, fingerprint=account, family="patients")
    ledger = Ledger.open(tmp_path, terms)
    ledger.reserve(key("a"), [DP_SGD])
    smaller = Ledger.open(tmp_path, replace(terms, num_examples=999))
    smaller.reserve(key("b"), [DP_SGD])
    assert len(ledger.summary()["entries"]) == 2
    assert ledger.summary()["family"] == "patients"
    assert Ledger.at(ledger.path).terms == terms
    for name, value in (("delta", 2e-5), ("budget", 3.0), ("neighboring_relation", "replace_one")):
        with pytest.raises(LedgerError, match=f"^{name}="):
            Ledger.open(tmp_path, replace(terms, **{name: value}))


def test_the_lines_of_a_single_data_sets_ledger_have_the_form_that_they_always_had(tmp_path):
    ledger = begun(tmp_path, tmp_path / "note", trials=1)
    first, second = map(json.loads, ledger.path.read_text().splitlines())
    common = {"kind", "sequence", "time", "previous", "hash"}
    terms = {"fingerprint", "num_examples", "delta", "neighboring_relation", "budget", "unit"}
    assert set(first) == common | terms
    figures = {"epsilon_after", "accountant"}
    assert set(second) == common | {"key", "events", "note", "within"} | figures
