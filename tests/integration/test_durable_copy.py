"""The durable copy of the ledgers, in a store that speaks S3's protocol: moto's server."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import count
from pathlib import Path

import pytest
from s3_store import BUCKET, SECRET, s3
from test_ledger_processes import ACTS, STEP, TERMS, begin, die_before_call, in_child, key, states
from two_ranks import TINY

from core.__main__ import main
from core.config import load
from core.errors import ConfigError, LedgerError
from core.io.files import write_whole
from core.privacy.ledger import durable_copy
from core.privacy.ledger.account import Spending
from core.privacy.ledger.durable_copy import PLACE, DurableCopy
from core.privacy.ledger.file import accept_loss, keep_copy
from core.privacy.ledger.ledger import Ledger
from core.privacy.ledger.names import ledger_path
from core.privacy.ledger.notes import beside_secret
from core.privacy.plan.plan import make_plan
from sweep.config.sweep import load_sweep
from sweep.driver.cluster import check_places

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("store")


def objects(address: str, name: str) -> dict[str, bytes]:
    """What the store holds of a ledger, by number."""
    prefix = f"{address.removeprefix(f's3://{BUCKET}/')}/{name}/"
    found = s3().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    keys = sorted(each["Key"] for each in found)
    read = {key: s3().get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}
    return {key.removeprefix(prefix): content for key, content in read.items()}


def is_copied(ledger: Ledger, address: str) -> bool:
    """Whether the copy is the ledger, line by line."""
    lines = ledger.path.read_bytes().splitlines()
    return [*objects(address, ledger.path.stem).values()] == lines


def head(folder: Path, address: str) -> Ledger:
    """A head with a disk of its own; the master secret is that of all."""
    keep_copy(folder, address)
    return Ledger.open(folder, TERMS)


def kept(ledger: Ledger) -> dict[str, bytes]:
    """The file and its head."""
    return {suffix: ledger.path.with_suffix(suffix).read_bytes() for suffix in (".jsonl", ".head")}


def trials(ledger: Ledger) -> list[str]:
    return [entry["trial"] for entry in ledger.summary()["entries"]]


def program(act: str, *more: object) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(Path(__file__).with_name("ledger_heads.py")),
        act,
        *map(str, more),
    ]
    path = f"{ROOT}:{ROOT}/tests/unit:{ROOT}/tests/integration"
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_each_line_is_an_object_of_its_own(tmp_path, address):
    ledger = head(tmp_path, address)
    ledger.commit(ledger.reserve(key("one"), [STEP]), 4)
    ledger.take_over("sweep", "host:1", 7)
    assert is_copied(ledger, address)
    assert [*objects(address, ledger.path.stem)] == [f"{number:08}" for number in range(4)]
    assert (tmp_path / PLACE).stat().st_mode & 0o777 == 0o600
    assert accept_loss(ledger.path, "fire") == 4
    assert is_copied(ledger, address)
    assert ledger.verify() == 5


def test_lines_from_before_are_copied(tmp_path, address):
    ledger = begin(tmp_path)
    keep_copy(tmp_path, None)
    assert not (tmp_path / PLACE).exists()
    keep_copy(tmp_path, address)
    assert is_copied(ledger, address)
    assert ledger.verify() == 2


# Two heads that believe in the same history.


def test_of_two_heads_one_gets_the_line(tmp_path, address):
    ledgers = [head(tmp_path / name, address) for name in "ab"]
    before = [kept(ledger) for ledger in ledgers]
    assert before[0] == before[1]
    racing = [program("reserve_when_told", tmp_path / name, name) for name in "ab"]
    for process in racing:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.stderr and process.stderr.read()
    for process in racing:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=100)[1] for process in racing]
    assert sorted(process.returncode for process in racing) == [0, 1]
    loser = [process.returncode for process in racing].index(1)
    copy = f"{address}/{ledgers[0].path.stem}"
    assert f"another machine went on with '{copy}'" in said[loser]
    assert "nothing was spent" in said[loser]
    assert len(said[loser].splitlines()) == 1
    assert kept(ledgers[loser]) == before[loser]
    assert trials(ledgers[1 - loser]) == ["ab"[1 - loser]]
    # The same command takes the other line over, and then adds its own.
    ledgers[loser].reserve(key("ab"[loser]), [STEP])
    assert trials(ledgers[loser]) == ["ab"[1 - loser], "ab"[loser]]
    assert trials(ledgers[1 - loser]) == trials(ledgers[loser])
    assert kept(ledgers[0]) == kept(ledgers[1])
    assert is_copied(ledgers[0], address)


def test_heads_that_race_on_write_one_history(tmp_path, address):
    for name in "abc":
        keep_copy(tmp_path / name, address)
    racing = [program("reserve_until_admitted", tmp_path / name, name, 4) for name in "abc"]
    for process in racing:
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said
    ledgers = [Ledger.open(tmp_path / name, TERMS) for name in "abc"]
    assert sorted(trials(ledgers[0])) == [f"{name}{i}" for name in "abc" for i in range(4)]
    assert [ledger.verify() for ledger in ledgers] == [13] * 3
    assert kept(ledgers[0]) == kept(ledgers[1]) == kept(ledgers[2])
    assert is_copied(ledgers[0], address)


def test_a_run_that_another_head_took_over_is_refused(tmp_path, address):
    first, second = (head(tmp_path / name, address) for name in "ab")
    first.take_over("sweep", "the first", 1)
    second.take_over("sweep", "the second", 2)
    with pytest.raises(LedgerError, match="the second holds token 2"):
        first.reserve(key("late"), [STEP])


# What dies: before each call to the store or the disk, and with its answer on the way.


@pytest.mark.parametrize("act", ACTS)
def test_a_death_between_copy_and_line_is_found_by_the_same_question(tmp_path, address, act):
    process = program("die", tmp_path, address, act)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    *deaths, outlived = sorted(place for place in tmp_path.iterdir())
    # Before the object and after it; then as many as without a copy.
    assert len(deaths) == 13
    after = states(Ledger.at(ledger_path(outlived, TERMS.fingerprint)))
    for place in deaths:
        ledger = Ledger.open(place, TERMS, known=True)  # Of the same name, by the same secret.
        own = f"{address}/{place.name}"
        copied = len(objects(own, ledger.path.stem))
        assert copied == (2 if place.name == "000" else 3)
        assert ledger.verify() == copied  # Also where the line was torn, or not begun.
        if copied < 3:
            ACTS[act](ledger)  # The same again, as a restarted process does.
        assert states(ledger) == after
        assert ledger.verify() == 3
        assert is_copied(ledger, own)


# A head that lost its disk.


def begun(folder: Path, address: str) -> Ledger:
    ledger = head(folder, address)
    for trial in ("one", "two", "three"):
        ledger.reserve(key(trial), [STEP])
    return ledger


@pytest.mark.parametrize("knows", [True, False], ids=["note", "no note"])
def test_a_lost_disk_is_restored_by_one_command(tmp_path, address, knows, monkeypatch, capsys):
    ledger = begun(tmp_path / "disk", address)
    before, summary = kept(ledger), ledger.summary()
    shutil.rmtree(tmp_path / "disk")
    if not knows:
        beside_secret(ledger.path).unlink()
        # Nor would its name be found: another secret names other files.
        monkeypatch.setenv("FETA_SWEEP_SECRET_FILE", str(tmp_path / "other.secret"))
    folder = ["--folder", str(tmp_path / "disk")]
    assert main(["ledger", "restore", *folder]) == 2
    assert "--copy" in capsys.readouterr().err
    assert main(["ledger", "restore", *folder, "--copy", address]) == 0
    assert "unbroken" in capsys.readouterr().out
    again = Ledger.open(tmp_path / "disk", TERMS)
    assert again.path == ledger.path
    assert kept(again) == before
    assert again.summary() | {"name": ""} == summary | {"name": ""}
    again.reserve(key("four"), [STEP])
    assert is_copied(again, address)
    # A single lost file is found by the next call, or by the command.
    for suffix in (".jsonl", ".head"):
        again.path.with_suffix(suffix).unlink()
    assert main(["ledger", "restore", *folder]) == 0
    for suffix in (".jsonl", ".head"):
        again.path.with_suffix(suffix).unlink()
    assert Ledger.at(again.path).verify() == 5


def test_an_older_copy_of_the_disk_catches_up(tmp_path, address):
    ledger = begun(tmp_path, address)
    early = kept(ledger)
    ledger.reserve(key("late"), [STEP])
    for suffix, content in early.items():
        ledger.path.with_suffix(suffix).write_bytes(content)
    assert ledger.verify() == 5
    assert trials(ledger)[-1] == "late"


def test_a_restore_that_was_killed_goes_on(tmp_path, address):
    ledger = begun(tmp_path, address)
    before = kept(ledger)
    for number in count():
        for suffix in (".jsonl", ".head"):
            ledger.path.with_suffix(suffix).unlink()

        def doomed(number: int = number) -> None:
            durable_copy._client.cache_clear()
            die_before_call(number)
            Ledger.at(ledger.path)

        died = os.waitpid(in_child(doomed), 0)[1] == signal.SIGKILL
        assert Ledger.at(ledger.path).verify() == 4
        assert kept(ledger) == before
        if not died:
            break
    assert number > 4 * 5


# A copy that is not the ledger's.


def spoil(address: str, name: str, number: int, content: bytes | None) -> None:
    where = f"{address.removeprefix(f's3://{BUCKET}/')}/{name}/{number:08}"
    if content is None:
        s3().delete_object(Bucket=BUCKET, Key=where)
    else:
        s3().put_object(Bucket=BUCKET, Key=where, Body=content)


def test_another_history_is_refused_with_both_named(tmp_path, address):
    ledger = begun(tmp_path / "a", address)
    other = Ledger.open(tmp_path / "b", TERMS)  # Begun without the copy.
    other.reserve(key("other"), [STEP])
    before, copied = kept(other), objects(address, ledger.path.stem)
    with pytest.raises(LedgerError) as caught:
        keep_copy(tmp_path / "b", address)
    assert f"'{other.path}' and its copy '{address}/{ledger.path.stem}' hold" in str(caught.value)
    assert not (tmp_path / "b" / PLACE).exists()
    assert kept(other) == before
    assert objects(address, ledger.path.stem) == copied


@pytest.mark.parametrize("number", [3, 4])
def test_a_line_that_does_not_follow_is_not_taken_over(tmp_path, address, number):
    ledger = begun(tmp_path, address)
    before = kept(ledger)
    line = ledger.path.read_bytes().splitlines()[2]
    spoil(address, ledger.path.stem, number, line.replace(b"two", b"six"))
    for act in (ledger.verify, lambda: ledger.reserve(key("more"), [STEP])):
        with pytest.raises(LedgerError, match="hold different lines"):
            act()
    assert kept(ledger) == before


def test_a_copy_with_a_gap_restores_nothing(tmp_path, address):
    ledger = begun(tmp_path / "disk", address)
    shutil.rmtree(tmp_path / "disk")
    spoil(address, ledger.path.stem, 2, None)
    with pytest.raises(LedgerError, match=f"copy '{address}/.*lacks a line"):
        keep_copy(tmp_path / "disk", address)


def test_a_copy_that_lost_its_end_is_found_by_a_note_and_mended_by_the_ledger(tmp_path, address):
    ledger = begun(tmp_path / "disk", address)
    early = kept(ledger)
    spoil(address, ledger.path.stem, 3, None)
    assert ledger.verify() == 4
    assert is_copied(ledger, address)
    spoil(address, ledger.path.stem, 3, None)
    shutil.rmtree(tmp_path / "disk")
    with pytest.raises(LedgerError, match=r"it is shorter than .* knows"):
        keep_copy(tmp_path / "disk", address)
    for suffix, content in early.items():
        ledger.path.with_suffix(suffix).write_bytes(content)
    keep_copy(tmp_path / "disk", address)
    assert is_copied(ledger, address)


def test_what_a_note_contradicts_is_not_copied(tmp_path, address):
    ledger = begin(tmp_path)
    early = kept(ledger)
    ledger.reserve(key("late"), [STEP])
    for suffix, content in early.items():
        ledger.path.with_suffix(suffix).write_bytes(content)
    with pytest.raises(LedgerError, match=r"it is shorter than .* knows"):
        keep_copy(tmp_path, address)
    assert not objects(address, ledger.path.stem)


def test_a_damaged_file_is_filled_from_the_copy_when_its_loss_is_accepted(tmp_path, address):
    ledger = begun(tmp_path, address)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join([*lines[:2], b"{}\n", *lines[3:]]))
    with pytest.raises(LedgerError, match="edited or truncated"):
        ledger.verify()
    assert accept_loss(ledger.path, "edited") == 4
    assert trials(ledger) == ["one", "two", "three"]
    assert is_copied(ledger, address)


def test_a_folder_has_one_copy(tmp_path, address):
    head(tmp_path, address)
    with pytest.raises(LedgerError, match=f"are copied to '{address}': name that, or delete"):
        keep_copy(tmp_path, f"{address}/other")
    (tmp_path / PLACE).write_text(f"{address}\n")  # As an editor ends it.
    keep_copy(tmp_path, address)
    (tmp_path / PLACE).unlink()
    (tmp_path / PLACE).mkdir()  # As little to be read as what belongs to another user.
    with pytest.raises(LedgerError, match="cannot be read"):
        keep_copy(tmp_path, address)


# A store that does not answer, or does not keep what it promises.


@pytest.fixture
def silent(monkeypatch) -> Iterator[socket.socket]:
    """A server that accepts and never answers."""
    monkeypatch.setattr(durable_copy, "_CONNECT_S", 0.2)
    monkeypatch.setattr(durable_copy, "_ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        durable_copy._client.cache_clear()
        yield server
    durable_copy._client.cache_clear()


@pytest.mark.parametrize("fault", ["silent", "nobody", "bucket", "credentials", "endpoint"])
def test_without_an_answer_nothing_is_charged(tmp_path, address, fault, request, monkeypatch):
    ledger = head(tmp_path / "disk", address)
    before, names = kept(ledger), objects(address, ledger.path.stem)
    with monkeypatch.context() as patch:
        if fault == "bucket":
            (tmp_path / "disk" / PLACE).write_text("s3://no-such-bucket/x")
        elif fault == "credentials":
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.delenv(name)
            patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        elif fault == "endpoint":
            patch.setenv("AWS_ENDPOINT_URL", "nowhere")
        else:
            server = request.getfixturevalue("silent")
            if fault == "nobody":
                server.close()
        durable_copy._client.cache_clear()
        began = time.monotonic()
        with pytest.raises(LedgerError) as caught:
            ledger.reserve(key("more"), [STEP])
        assert time.monotonic() - began < 60
    durable_copy._client.cache_clear()
    assert "cannot be reached or written (" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert kept(ledger) == before
    if fault not in ("silent", "nobody"):
        (tmp_path / "disk" / PLACE).write_text(address)
        assert objects(address, ledger.path.stem) == names


def test_a_bounded_wait_is_less_than_a_minute():
    each = durable_copy._CONNECT_S + durable_copy._ANSWER_S
    assert each * durable_copy._TRIES < 60


class Forgetful(BaseHTTPRequestHandler):
    """Speaks as much of the protocol as an older store, which overwrites whatever is asked."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def test_a_store_that_overwrites_is_refused(tmp_path, address, monkeypatch):
    with HTTPServer(("127.0.0.1", 0), Forgetful) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        durable_copy._client.cache_clear()
        with pytest.raises(LedgerError, match="does not refuse to make an object twice"):
            keep_copy(tmp_path / "disk", address)
        server.shutdown()
    durable_copy._client.cache_clear()
    assert not (tmp_path / "disk").exists()


def test_a_first_try_whose_answer_got_lost_is_its_own(tmp_path, address):
    copy = DurableCopy(address)
    assert copy.create("a" * 16, 0, b"line")
    assert copy.create("a" * 16, 0, b"line")  # As botocore asks again.
    assert not copy.create("a" * 16, 0, b"another line")
    assert copy.line("a" * 16, 0) == b"line"


def test_without_boto3_one_line_names_what_to_install(tmp_path, address, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(LedgerError, match=r"needs boto3: install .* extra 's3'"):
        keep_copy(tmp_path, address)


# The configuration.


@pytest.mark.parametrize("value", ["gs://bucket/x", "abfs://c@a/x", "s3://", "bucket/x", "s3:///x"])
def test_other_places_are_refused_in_one_line(value):
    with pytest.raises(ConfigError, match=r"must be s3://BUCKET/FOLDER") as caught:
        load({}, {"runtime.ledger_copy": value})
    assert len(str(caught.value).splitlines()) == 1
    assert load({}, {"runtime.ledger_copy": "s3://b-1.x/y/"}).runtime.ledger_copy == "s3://b-1.x/y"


def account(folder: Path, address: str) -> Spending:
    places = {"runtime.ledger": str(folder / "ledger"), "runtime.ledger_copy": address}
    config = load({}, TINY | places)
    run = folder / "run"
    return Spending(config, make_plan(config), folder / "ledger", "run", run, run / "charged")


def test_a_run_with_the_key_charges_the_copy_and_finds_its_charge_on_a_new_disk(tmp_path, address):
    account(tmp_path / "first", address).reserve("ab" * 32, "trial")
    (path,) = (tmp_path / "first" / "ledger").glob("*.jsonl")
    ledger = Ledger.at(path)
    assert is_copied(ledger, address)
    shutil.rmtree(tmp_path / "first")
    again = account(tmp_path / "second", address)
    reservation = again.reserve("ab" * 32, "trial")
    restored = Ledger.at(tmp_path / "second" / "ledger" / path.name)
    assert trials(restored) == ["trial"]
    # How many steps had begun is lost with the disk, so all count.
    assert again.commit("ab" * 32, reservation) == reservation.key.end_step


@pytest.mark.parametrize("known", [True, False])
def test_a_sweep_is_refused_before_it_claims_anything(tmp_path, silent, known):
    keys = {"storage_path": str(tmp_path), "name": "swept", "runtime.ledger": str(tmp_path / "l")}
    keys |= {"runtime.ledger_copy": f"s3://{BUCKET}/swept"}
    sweep = load_sweep(ROOT / "sweep" / "configs" / "quickstart.yaml", keys)
    if known:
        write_whole(tmp_path / "l" / PLACE, keys["runtime.ledger_copy"])
    with pytest.raises(LedgerError, match="cannot be reached or written"):
        check_places(sweep)
    assert not sweep.folder.exists()
    assert [path.name for path in (tmp_path / "l").iterdir()] == [PLACE] * known
