"""A ledger's file is called by a keyed name, and found whatever secret named it."""

import shutil
from pathlib import Path

import pytest

from core.__main__ import main
from core.errors import LedgerError
from core.privacy.keys import SECRET_FILE_VARIABLE
from core.privacy.ledger.ledger import Ledger
from core.privacy.ledger.names import ledger_path, shown_name
from core.privacy.ledger.terms import Event, Key, Terms

FINGERPRINT = "3b" * 32
TERMS = Terms(FINGERPRINT, 1_000, 1e-5, "zero_out", None)
KEY, EVENTS = Key("run", "t", "all", 0, 10), (Event("dp_sgd", 0.1, 2.0, 10),)


@pytest.fixture
def secret(tmp_path, monkeypatch):
    """Goes on with another master secret."""

    def change(name: str) -> None:
        monkeypatch.setenv(SECRET_FILE_VARIABLE, str(tmp_path / name / "master.secret"))

    change("one")
    return change


def begin(folder: Path) -> Ledger:
    ledger = Ledger.open(folder, TERMS)
    ledger.reserve(KEY, EVENTS)
    return ledger


def as_earlier_versions_named_it(ledger: Ledger) -> Path:
    path = ledger.path.with_name(f"{FINGERPRINT[:16]}.jsonl")
    for suffix in (".jsonl", ".head", ".lock"):
        ledger.path.with_suffix(suffix).rename(path.with_suffix(suffix))
    return path


def test_a_name_is_keyed(tmp_path, secret):
    names = {shown_name(FINGERPRINT), shown_name("4c" * 32)}
    secret("other")
    assert len(names | {shown_name(FINGERPRINT)}) == 3
    path = begin(tmp_path).path
    assert path.stem == shown_name(FINGERPRINT)
    assert not any("3b3b" in each.name for each in tmp_path.iterdir())


def test_a_ledger_is_found_whatever_secret_named_it(tmp_path, secret):
    path = begin(tmp_path / "ledger").path
    secret("other")
    assert path.stem != shown_name(FINGERPRINT)
    assert Ledger.open(tmp_path / "ledger", TERMS).path == path
    assert len(Ledger.open(tmp_path / "ledger", TERMS).summary()["entries"]) == 1


def test_two_ledgers_of_one_data_set_are_refused(tmp_path, secret):
    path = begin(tmp_path).path
    shutil.copy(path, tmp_path / "0123456789abcdef.jsonl")
    with pytest.raises(LedgerError, match="are ledgers of one data set, so none holds all"):
        Ledger.open(tmp_path, TERMS)


@pytest.mark.parametrize("lost", [False, True])
def test_a_ledger_of_an_earlier_version_stays_and_is_missed_where_it_is_lost(
    tmp_path, secret, lost
):
    path = as_earlier_versions_named_it(begin(tmp_path))
    path.chmod(0o644)
    assert ledger_path(tmp_path, FINGERPRINT) == path
    if lost:
        path.unlink()
        with pytest.raises(LedgerError, match="restore"):
            Ledger.open(tmp_path, TERMS)
    else:
        begin(tmp_path).take_over("run", "host:1", 1)
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("earlier", [False, True])
def test_nothing_that_is_printed_holds_the_digest(tmp_path, secret, capsys, earlier):
    ledger = begin(tmp_path)
    name = ledger.name
    if earlier:
        as_earlier_versions_named_it(ledger)
    for action in ("show", "verify"):
        assert main(["ledger", action, "--folder", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert f"data set {name}" in out
        assert "3b3b" not in out
