"""Copies of run folders in moto's store, and trials that go on from them on another machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import folder_writer
import pytest
import torch
from folder_writer import fill, writer
from s3_store import BUCKET, SECRET, forget_clients, s3, s3_store
from two_ranks import TINY, StopRunError, stop_at

from clusters.local.ports import free_ports
from core.config import load, nested
from core.errors import ConfigError, StorageError
from core.io.terminal import Report
from core.pipeline import released
from core.pipeline.context import SweepLink
from core.pipeline.run import run
from core.privacy.keys import MasterSecret
from core.privacy.ledger.account import Spending
from core.privacy.ledger.ledger import Ledger
from core.record.folder import STEPS_BEGUN, RunFolder
from sweep.config.address import storage_folder
from sweep.config.sweep import SweepConfig, load_sweep
from sweep.driver.cluster import check_places
from sweep.driver.kept_folder import bring, kept
from sweep.results import folder_copy
from sweep.results.claim import claim, driver_lock, newest_launch
from sweep.results.folder_copy import FolderCopy
from sweep.trials.own_folder import own_folder_of

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "sweep" / "configs" / "quickstart.yaml"
pytestmark = pytest.mark.usefixtures("store")


def keys(address: str) -> list[str]:
    """Of all objects below the address, but for those that stand for folders."""
    prefix = address.removeprefix(f"s3://{BUCKET}/") + "/"
    pages = s3().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    found = [
        each["Key"].removeprefix(prefix) for page in pages for each in page.get("Contents", [])
    ]
    return sorted(key for key in found if not key.endswith("/") and key)


def version_in(folder: Path) -> int:
    """Which version a folder is; it is no mixture."""
    version = int((folder / "number").read_text())
    large = (folder / "sub" / "large").read_bytes()
    assert large == str(version).encode() * 3_000_000
    assert (folder / "sub" / "odd").exists() == bool(version % 2)
    assert (folder / "same").read_text() == "same"
    return version


def fetched(address: str, folder: Path) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    assert FolderCopy(address).fetch(folder)
    return version_in(folder)


# What is at the address is one state of the folder.


def test_a_folder_comes_back_as_it_was_and_old_files_go(tmp_path, address):
    here, there = tmp_path / "here", tmp_path / "there"
    copy = writer(address)
    for version in (1, 2, 3):
        fill(here, version)
        copy.keep(here)
        assert fetched(address, there) == version
    kept = sorted(path for path in here.rglob("*") if path.is_file())
    for path in kept:
        other = there / path.relative_to(here)
        assert other.stat().st_mtime_ns == path.stat().st_mtime_ns
        assert other.stat().st_mode & 0o77 == 0
    assert len(keys(address)) == len(kept) + 1
    assert not FolderCopy(f"{address}/other").fetch(tmp_path / "none")
    assert not (tmp_path / "none").exists()


class DiedError(BaseException):
    """Stands for a killed process."""


class Mortal:
    """A store to which its user makes only so many calls."""

    def __init__(self, store: Any, calls: int) -> None:
        self._store, self._left = store, calls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not self._left:
            raise DiedError
        self._left -= 1
        return getattr(self._store, name)


def test_a_writer_that_dies_between_any_two_calls_leaves_one_state(tmp_path, address, monkeypatch):
    here, there, survived = tmp_path / "here", tmp_path / "there", False
    seen: set[int] = set()
    for calls in count():
        own = f"{address}/{calls}"
        copy = writer(own)
        fill(here, 1)
        copy.keep(here)
        fill(here, 2)
        with monkeypatch.context() as patch:
            store, root = folder_copy._file_system(own)
            reached = Mortal(store, calls), root
            patch.setattr(folder_copy, "_file_system", lambda _, reached=reached: reached)
            try:
                copy.keep(here)
                survived = True
            except DiedError:
                pass
        seen.add(fetched(own, there))
        # Who goes on begins with all that it found, and leaves nothing of its predecessor.
        heir = writer(own)
        fill(there, 4)
        heir.keep(there)
        assert fetched(own, tmp_path / "again") == 4
        assert len(keys(own)) == 4
        if survived:
            break
    assert seen == {1, 2}
    assert calls > 5


def test_a_writer_that_is_killed_leaves_one_state(tmp_path, address):
    for delay in (0.0, 0.015, 0.04):
        process = subprocess.Popen(
            [sys.executable, folder_writer.__file__, address, str(tmp_path / "here")],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        told = ["1", *process.communicate()[0].split()]
        assert fetched(address, tmp_path / "there") in (int(told[-1]), int(told[-1]) + 1)


def test_a_writer_that_was_given_up_changes_nothing(tmp_path, address):
    here, there = tmp_path / "here", tmp_path / "there"
    late, heir = writer(address), FolderCopy(address, 1)
    fill(here, 1)
    late.keep(here)
    heir.begin()
    assert fetched(address, there) == 1
    fill(here, 2)
    with pytest.raises(ConfigError, match="was taken over"):
        late.keep(here)
    assert fetched(address, there) == 1
    fill(there, 3)
    heir.keep(there)
    # One that had looked before its heir began.
    store, root = folder_copy._file_system(address)
    late._send_all(store, f"{root}/{late.session}", here, lambda _: False)
    assert fetched(address, tmp_path / "again") == 3
    # Nor does a worker of an older driver begin again.
    with pytest.raises(ConfigError, match="was taken over"):
        writer(address, launch=0)


def test_a_torn_manifest_leaves_the_state_before(tmp_path, address):
    fill(tmp_path / "here", 1)
    copy = writer(address)
    copy.keep(tmp_path / "here")
    torn = f"{tmp_path.name}/{copy.session}/000002.manifest"
    for content in (b"", b'{"same": {"nu'):
        s3().put_object(Bucket=BUCKET, Key=torn, Body=content)
        assert fetched(address, tmp_path / "there") == 1
    fill(tmp_path / "here", 2)
    copy.keep(tmp_path / "here")
    assert fetched(address, tmp_path / "there") == 2


def test_a_copy_that_was_damaged_is_not_taken(tmp_path, address, monkeypatch):
    fill(tmp_path / "here", 1)
    writer(address).keep(tmp_path / "here")
    (large,) = (key for key in keys(address) if key.endswith("large"))
    s3().put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/{large}", Body=b"1" * 2_999_999)
    with pytest.raises(StorageError, match="sub/large is not as it was written"):
        FolderCopy(address).fetch(tmp_path / "there", patience=0)
    assert not (tmp_path / "there" / "sub" / "large").exists()


# A store that does not answer.


class Refusing(BaseHTTPRequestHandler):
    """A store that takes no credentials."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_PUT = do_POST = do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.mark.parametrize("fault", ["nobody", "bucket", "credentials"])
def test_a_sweep_is_refused_in_one_line_before_it_claims_anything(fault, monkeypatch, tmp_path):
    bucket = "no-such-bucket" if fault == "bucket" else BUCKET
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    sweep = load_sweep(QUICKSTART, {"storage_path": f"s3://{bucket}/runs"})
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        if fault != "bucket":
            port = server.server_port if fault == "credentials" else free_ports(1)[0]
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        forget_clients()
        began = time.monotonic()
        with pytest.raises(StorageError) as caught:
            check_places(sweep)
        server.shutdown()
    forget_clients()
    assert time.monotonic() - began < 60
    reasons = {"nobody": "NETWORK_CONN", "bucket": "NO_SUCH_BUCKET", "credentials": "ACCESS_DENIED"}
    assert f"'s3://{bucket}/runs' cannot be reached, read or written (" in str(caught.value)
    assert reasons[fault] in str(caught.value)
    assert SECRET not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not sweep.folder.exists()


def test_a_store_that_comes_back_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_copy, "_PAUSE_S", 0.1)
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    forget_clients()
    fill(tmp_path / "here", 1)
    found: list[int] = []

    def keep() -> None:
        writer(f"s3://{BUCKET}/waited").keep(tmp_path / "here", patience=60)
        found.append(fetched(f"s3://{BUCKET}/waited", tmp_path / "there"))

    thread = threading.Thread(target=keep)
    thread.start()
    with s3_store(BUCKET, port):
        thread.join(60)
    forget_clients()
    assert found == [1]


# A trial whose machine is lost.

STEPS = {"training.num_steps": 16, "runtime.checkpoint_every": 3, "runtime.log_every": 1}


def gone(*_: object) -> int:
    raise StopRunError


class Head:
    """A head's disk, and machines of their own that train its trial one after the other."""

    def __init__(
        self, folder: Path, address: str, patch: pytest.MonkeyPatch, **changes: object
    ) -> None:
        self.folder, self._address, self._patch = folder, address, patch
        places = {"runtime.ledger": str(folder / "ledger"), "runtime.cache": str(folder / "cache")}
        self.config = load({}, TINY | STEPS | places | changes)

    def train(self, machine: Path, report: Report = lambda _: None, lost: bool = False) -> None:
        """Trains on a machine, which may be lost with what it would do last."""
        self._patch.setenv("XDG_DATA_HOME", str(machine))
        run_dir = self.folder / "trials" / "trial"
        settings = {
            **{"run_dir": str(run_dir), "config": nested(self.config), "name": "sweep"},
            **{"address": self._address, "copy": FolderCopy(self._address, 1)},
        }

        def account(own: Spending) -> Spending:
            own = replace(own, run_dir=run_dir)
            if lost:
                own.commit = gone
            return own

        with own_folder_of(settings, True, lambda: None) as own:
            charged = self.folder / "charged"
            link = SweepLink(lease=1, account=account, charged=charged, keep=own.keep)
            secret = MasterSecret(b"s" * 32)
            run(own.config, own.path, master=secret, name="sweep", report=report, link=link)
            own.keep()
        assert not own.path.exists()

    def fetched(self) -> RunFolder:
        folder = RunFolder(self.folder / "trials" / "trial")
        assert FolderCopy(self._address).fetch(folder.path)
        return folder

    def summary(self) -> dict[str, Any]:
        (path,) = (self.folder / "ledger").glob("*.jsonl")
        return Ledger.at(path).summary()


def quiet_model(folder: Path, origin: str) -> dict[str, torch.Tensor]:
    """The model of the same keys where nothing happens."""
    places = {"runtime.ledger": str(folder / "ledger"), "runtime.cache": str(folder / "cache")}
    run_dir = RunFolder(folder / "trial")
    run_dir.path.mkdir(parents=True)
    run_dir.nonce.write_text(origin)
    secret, config = MasterSecret(b"s" * 32), load({}, TINY | STEPS | places)
    run(config, run_dir.path, master=secret, name="quiet", report=lambda _: None)
    return torch.load(run_dir.model)


def test_a_trial_goes_on_elsewhere_from_an_older_copy_and_replays_exactly(
    tmp_path, address, monkeypatch
):
    head = Head(tmp_path / "head", address, monkeypatch)
    with pytest.raises(StopRunError):
        head.train(tmp_path / "first", stop_at(14), lost=True)
    (entry,) = head.summary()["entries"]
    assert entry["state"] == "reserved"
    kept = head.fetched()
    assert head.config.warm_up_steps + torch.load(kept.checkpoints / "last.pt")["step"] == 11
    trained: list[int] = []

    def report(metrics: dict[str, Any]) -> None:
        trained.extend([metrics["step"]] if metrics["stage"] == "private_training" else [])

    with monkeypatch.context() as patch:
        patch.setattr(released, "release_central_images", lambda *_, **__: pytest.fail("drawn"))
        head.train(tmp_path / "second", report)
    assert trained == [12, 13, 14, 15, 16]
    (entry,) = head.summary()["entries"]
    assert entry["state"] == "committed"
    assert entry["executed_steps"] == head.config.training.num_steps - head.config.warm_up_steps
    found = head.fetched()
    assert found.result() is not None
    expected = quiet_model(tmp_path / "quiet", found.nonce.read_text())
    model = torch.load(found.model)
    assert model.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(model[name], value), name
    reported = [each["step"] for each in found.reports()]
    assert reported == sorted(reported)
    # A trial that has ended keeps no checkpoint, and no private cache left its machine.
    assert not [key for key in keys(address) if key.endswith("checkpoints/last.pt")]
    assert not [key for key in keys(address) if "images-" in key or "charged" in key]


def test_where_the_copy_cannot_be_kept_nothing_is_charged_or_told(tmp_path, address, monkeypatch):
    monkeypatch.setattr(folder_copy, "_KEEP_S", 0.0)
    head = Head(tmp_path / "head", address, monkeypatch)
    keep, outage = FolderCopy.keep, {"after": 0}
    calls = count()

    def failing(self: FolderCopy, folder: Path, left_out: Any, patience: float = 0) -> None:
        if 0 <= outage["after"] <= next(calls):
            raise StorageError("away")
        keep(self, folder, left_out, patience)

    monkeypatch.setattr(FolderCopy, "keep", failing)
    with pytest.raises(StorageError):
        head.train(tmp_path / "machine")
    assert not list((tmp_path / "head" / "ledger").glob("*.jsonl"))
    # Before the released images are used, at a checkpoint, at the end: the same goes on.
    for outage["after"] in (1, 3, 6):
        calls = count()
        with pytest.raises(StorageError):
            head.train(tmp_path / "machine")
        assert head.fetched().result() is None
    outage["after"] = -1
    head.train(tmp_path / "machine")
    (entry,) = head.summary()["entries"]
    assert entry["state"] == "committed"
    found = head.fetched()
    expected = quiet_model(tmp_path / "quiet", found.nonce.read_text())
    for name, value in expected.items():
        assert torch.equal(torch.load(found.model)[name], value), name


def test_a_private_score_is_kept_before_it_is_told(tmp_path, address, monkeypatch):
    settings = {"early_scores.at": [0.75], "early_scores.metric": "dp_accuracy"}
    settings |= {"early_scores.num_images": 20, "privacy.dp_accuracy_stddev": 100.0}
    head = Head(tmp_path / "head", address, monkeypatch, **settings)
    told: dict[str, float] = {}

    def report(metrics: dict[str, Any]) -> None:
        if metrics["stage"] == "early_score":
            told.update(head.fetched().early_scores())
            assert told == {0.75: metrics["early_dp_accuracy"]}
        if metrics["stage"] == "done":
            told["end"] = json.loads(
                (head.fetched().private_scores / "dp_accuracy.json").read_text()
            )
            assert told["end"]["dp_accuracy"] == metrics["dp_accuracy"]
            raise StopRunError

    with pytest.raises(StopRunError):
        head.train(tmp_path / "machine", report)
    assert told


def test_what_its_owner_alone_may_see_is_never_kept(tmp_path, address, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "machine"))
    settings = {
        **{"run_dir": "/head/trial", "config": nested(load({}, TINY)), "name": "sweep"},
        **{"address": address, "copy": FolderCopy(address, 1)},
    }
    told: list[None] = []
    with own_folder_of(settings, True, lambda: told.append(None)) as own:
        folder = RunFolder(own.path)
        for path in (folder.inspection, folder.lock, folder.identity.with_suffix(".json.tmp")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("private")
        folder.log.write_text("kept")
        own.keep()
        cache = Path(own.config.runtime.cache)
        assert cache.is_relative_to(tmp_path / "machine")
        assert not cache.is_relative_to(own.path)
    assert [key.rpartition("/")[2] for key in keys(address)] == ["000001.manifest", "run.log"]
    assert len(told) == 1


# The driver's folder.


def test_a_head_takes_over_from_another_and_counts_all_when_it_comes_back(
    tmp_path, address, monkeypatch
):
    def head(name: str) -> SweepConfig:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / name))
        return load_sweep(QUICKSTART, {"storage_path": address, "name": "swept"})

    def trial(sweep: SweepConfig) -> RunFolder:
        return RunFolder(sweep.folder / "trials" / "one")

    first = head("first")
    bring(first)
    with driver_lock(first.folder) as launch:
        claim(first)
        with kept(first, launch) as (observer,):
            own = trial(first)
            own.charged.mkdir(parents=True)
            (Path(first.run.runtime.ledger)).mkdir(parents=True)
            counts = [
                place / f"a{STEPS_BEGUN}" for place in (own.charged, Path(first.run.runtime.ledger))
            ]
            for path in (*counts, own.error, own.selected, first.folder / "ray" / "state"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("1 me")
            observer.ended("one", {})
            second = head("second")
            bring(second)
            found = {path.name for path in second.folder.rglob("*") if path.is_file()}
            assert found == {"sweep.json", "launch", own.error.name, own.selected.name}
            with driver_lock(second.folder) as newer, kept(second, newer):
                assert newer > launch
                (second.folder / "sweep.log").write_text("second")
            (first.folder / "sweep.log").write_text("first")
    assert all(path.exists() for path in counts)
    bring(head("first"))
    assert (first.folder / "sweep.log").read_text() == "second"
    assert newest_launch(first.folder) == newer
    assert not any(path.exists() for path in counts)
    # As it is the last one now, its own count would hold.
    counts[0].write_text("1 me")
    bring(head("first"))
    assert counts[0].exists()


# The configuration.


@pytest.mark.parametrize(
    "place", ["hdfs://x/y", "s3://", "s3://user:key@bucket/x", "s3://bucket/x?region=y", "s3:///x"]
)
def test_other_addresses_are_refused_in_one_line(place):
    with pytest.raises(ConfigError, match=r"storage_path='.*' is refused: ") as caught:
        load_sweep(QUICKSTART, {"storage_path": place})
    assert len(str(caught.value).splitlines()) == 1


def test_the_ledger_lies_where_it_outlasts_a_head(monkeypatch):
    def runtime(**settings: object) -> Any:
        settings = {key.replace("__", "."): value for key, value in settings.items()}
        return load_sweep(QUICKSTART, settings).run.runtime

    monkeypatch.setenv("RAY_ADDRESS", "somewhere:1")
    found = runtime(storage_path="s3://bucket/runs/")
    assert found.ledger_copy == "s3://bucket/runs/ledger"
    assert found.ledger.startswith(os.environ["XDG_DATA_HOME"])
    own = runtime(storage_path="s3://bucket/runs", runtime__ledger_copy="s3://safe/ledger")
    assert own.ledger_copy == "s3://safe/ledger"
    for place in ("gs://bucket/runs", "abfs://box@account.dfs.core.windows.net/runs"):
        with pytest.raises(ConfigError, match=r"set runtime.ledger_copy=s3://"):
            runtime(storage_path=place)
        assert runtime(storage_path=place, runtime__ledger="/disk").ledger_copy is None
        assert runtime(storage_path=place, runtime__ledger_copy="s3://box/l").ledger_copy
    private = {"evaluation.epoch_chosen_on": "dp", "storage_path": "s3://bucket/runs"}
    with pytest.raises(ConfigError, match="every worker draws private scores"):
        load_sweep(QUICKSTART, private | {"workers_per_trial": 2})


def test_other_commands_find_the_same_folder_by_the_address():
    sweep = load_sweep(QUICKSTART, {"storage_path": "s3://bucket/runs"})
    for place in ("s3://bucket/runs", "s3://bucket/runs/"):
        assert storage_folder(place) == Path(sweep.storage_path)
    other = load_sweep(QUICKSTART, {"storage_path": "s3://bucket-runs"})
    assert other.storage_path != sweep.storage_path
    with pytest.raises(ConfigError, match="give it as storage_path"):
        load_sweep(QUICKSTART, {"storage_address": "s3://bucket/runs"})
