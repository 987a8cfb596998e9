"""How many trials a cluster holds, and when its lack of room is an error."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pynvml
import pytest

from core import run
from core.config import load
from core.errors import ConfigError
from core.io.mounts import network_file_system, passes_no_locks
from sweep.config.sweep import load_sweep
from sweep.driver import cluster
from sweep.driver.cluster import check_storage, join_cluster
from sweep.driver.launch import run_sweep
from sweep.driver.room import check_room, max_concurrent, unused_gpus
from sweep.search.search import SameError

QUICKSTART = "tests/data/sweep.yaml"


def sweep(**settings: object):
    return load_sweep(QUICKSTART, settings)


@pytest.mark.parametrize(
    ("nodes", "grows", "settings", "expected"),
    [
        ([{"CPU": 8, "trial_driver": 64}], False, {}, 4),
        ([{"CPU": 8, "trial_driver": 3}], False, {}, 3),
        ([{"CPU": 8, "GPU": 2, "trial_driver": 64}], False, {"gpus_per_worker": 1}, 1),
        ([{"trial_driver": 8}, {"CPU": 3}, {"CPU": 3}], False, {"cpus_per_worker": 2}, 1),
        ([{"trial_driver": 8}, {"CPU": 2}], True, {}, 8),
        ([{"trial_driver": 8, "memory": 2.3e9}], True, {}, 5),
        ([{"trial_driver": 8, "memory": 2.3e9}, {"CPU": 8, "memory": 1e9}], False, {}, 4),
        ([{"trial_driver": 8, "memory": 0.3e9}], True, {}, 1),
        ([{"trial_driver": 8}, {"CPU": 2}], True, {"max_concurrent_trials": 2}, 2),
        ([{"CPU": 1, "trial_driver": 8}], False, {"min_workers_per_trial": 1}, 1),
    ],
)
def test_trials_at_once(nodes, grows, settings, expected):
    assert max_concurrent(sweep(**settings), nodes, grows) == expected


@pytest.mark.parametrize(
    ("count", "workers", "visible", "expected"),
    [
        (8, 2, None, 1),
        (1, 2, None, 0.5),
        (3, 4, None, 0.5),
        (8, 2, "3", 0.5),
        (8, 2, "", 0),
        (0, 2, None, 0),
    ],
)
def test_workers_take_the_gpus_of_this_machine(monkeypatch, count, workers, visible, expected):
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = sweep(workers_per_trial=workers)
    assert found.gpus_per_worker == expected
    assert found.trial_config({}).runtime.device == ("auto" if expected else "cpu")
    assert sweep(gpus_per_worker=0).gpus_per_worker == 0
    assert sweep(**{"runtime.device": "cpu"}).gpus_per_worker == 0
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:1")
    assert sweep().gpus_per_worker == 0


def test_without_gpus_asked_for_trials_compute_on_cpus_and_a_line_says_so():
    nodes = [{"CPU": 8, "GPU": 4, "trial_driver": 64}]
    assert sweep(gpus_per_worker=0).trial_config({}).runtime.device == "cpu"
    told = unused_gpus(sweep(gpus_per_worker=0), nodes)
    assert told.startswith("trials compute on CPUs, as gpus_per_worker=0: to use the 4 GPUs")
    assert not unused_gpus(sweep(gpus_per_worker=1), nodes)
    assert not unused_gpus(sweep(gpus_per_worker=0), [{"CPU": 8}])
    with pytest.raises(ConfigError, match=r"device='cuda' needs GPUs, but gpus_per_worker=0"):
        sweep(gpus_per_worker=0, **{"runtime.device": "cuda"})
    with pytest.raises(ConfigError, match=r"gpus_per_worker=2 .*\[0, 1\]"):
        sweep(gpus_per_worker=2)


def test_an_elastic_trial_needs_its_least_workers_alone(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:1")
    check_room(sweep(min_workers_per_trial=1), [{"CPU": 1}])
    with pytest.raises(ConfigError, match=r"needs 2 CPUs .*RAY_ADDRESS has 1: .*add node"):
        check_room(sweep(), [{"CPU": 1}])
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError, match=r"needs 2 GPUs .*this machine has 0: .*to a cluster"):
        check_room(sweep(gpus_per_worker=1), [{"CPU": 8}])


def test_a_worker_fits_on_one_node_or_not_at_all():
    check_room(sweep(cpus_per_worker=3), [{"CPU": 4}, {"CPU": 4}])
    with pytest.raises(ConfigError, match=r"2 workers with 3 CPUs each, .* hold 1: lower"):
        check_room(sweep(cpus_per_worker=3), [{"CPU": 4}, {"CPU": 2}])


def test_workers_of_a_trial_are_a_number_or_a_range():
    assert sweep().num_workers == 2
    assert sweep(min_workers_per_trial=1, workers_per_trial=4).num_workers == (1, 4)
    with pytest.raises(ConfigError, match="min_workers_per_trial=3 exceeds workers_per_trial=2"):
        sweep(min_workers_per_trial=3)


def test_only_the_same_error_in_a_row_counts():
    same = SameError(3)
    for failure in ("no file at 0x7f12", "no file at 0x7f99", "", "no file 1", "other"):
        same.ended(failure)
        assert not same.reached
    for free in (13, 12, 11):
        same.ended(f"no file {free}")
    assert same.reached == "3 trials in a row failed with the same error: no file 11"


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1:1", r"'127\.0\.0\.1:1' does not answer \(.*refused\): start the cluster"),
        ("http://127.0.0.1:8265", r"cannot be joined \(Invalid .*: name the head of a"),
        ("a..b:6379", r"'a\.\.b:6379' does not answer \(.*: start the cluster"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_sentence(monkeypatch, address, text):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # By another test in this process.
    with pytest.raises(ConfigError, match=text):
        join_cluster()


UNUSABLE = """
import os, sys
from core import run
from core.config import load
from core.errors import ConfigError
from sweep.driver.cluster import join_cluster
for name, value in (setting.split("=") for setting in sys.argv[1:]):
    kept = os.environ.get(name)
    os.environ[name] = value
    try:
        join_cluster()
    except ConfigError as error:
        print(str(error).splitlines())
    os.environ.pop(name) if kept is None else os.environ.update({name: kept})
"""


def test_folders_in_which_ray_cannot_start_are_one_sentence(tmp_path):
    (long := tmp_path / ("scratch" * 12)).mkdir()
    others = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    reasons = {
        "HOME=/proc/nohome": "/proc/nohome",
        "RAY_AUTH_TOKEN_PATH=/dev/null": "file cannot be opened or is empty",
        f"RAY_TMPDIR={long}": "107 bytes",
        "RAY_TMPDIR=/proc/x": "/proc/x",
    }
    ended = subprocess.run(
        [sys.executable, "-c", UNUSABLE, *reasons],
        env={**others, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    lines = [ast.literal_eval(told) for told in ended.stdout.splitlines()]
    for (line,), reason in zip(lines, reasons.values(), strict=True):
        assert reason in line.partition("): set ")[0]
        assert "set RAY_TMPDIR to a short folder that can be written" in line
        assert "and HOME to one that can, or RAY_AUTH_TOKEN_PATH to a file of yours" in line


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("file", "File exists"),
        ("file/below", "Not a directory"),
        ("loop", "File exists"),
        ("loop/below", "Too many levels"),
        ("x" * 300, "File name too long"),
        ("zero\0byte", "null byte"),
        ("/proc/nowhere", "No such file"),
        ("/sys", "Operation not permitted|Permission denied|Read-only file system"),
    ],
)
def test_a_storage_path_that_cannot_be_written_is_one_sentence(tmp_path, folder, reason):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=f"storage_path=.* is no folder .*({reason}).*: name"):
        check_storage(str(tmp_path / folder))


def test_a_storage_path_is_made_and_nothing_stays_in_it(tmp_path):
    check_storage(str(tmp_path / "new" / "line\n "))
    assert not list((tmp_path / "new" / "line\n ").iterdir())


def test_a_ledger_that_cannot_be_written_is_told_before_anything_is_claimed(tmp_path):
    (tmp_path / "file").touch()
    settings = {"storage_path": str(tmp_path / "runs"), "runtime.ledger": str(tmp_path / "file")}
    with pytest.raises(ConfigError, match=r"runtime\.ledger='.*/file' is no folder that can be"):
        run_sweep(sweep(**settings))
    assert not list((tmp_path / "runs").iterdir())


MOUNTS = """
22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/root rw
31 22 0:40 / /mnt/nfs4 rw,noatime - nfs4 10.0.0.2:/ rw,vers=4.1,rsize=1048576,local_lock=none
32 22 0:41 / /mnt/nfs3 rw - nfs 10.0.0.3:/share rw,vers=3,proto=tcp,local_lock=none
33 22 0:42 / /mnt/alone rw - nfs 10.0.0.3:/share rw,vers=4.0,local_lock=all
34 22 0:43 / /mnt/my\\040bucket rw,nosuid - fuse.gcsfuse bucket rw,user_id=0
35 34 0:44 / /mnt/my\\040bucket/disk rw - xfs /dev/sdb rw
36 22 0:45 / /mnt/stick rw - fuseblk /dev/sdc1 rw
37 22 0:46 / /layers rw - fuse.fuse-overlayfs fuse-overlayfs rw
38 22 0:47 / /mnt/windows rw - cifs //server/share rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/me/runs", ""),
        ("/mnt/nfs4/runs", "nfs4"),
        ("/mnt/nfs3/runs", "nfs"),
        ("/mnt/my bucket/runs", "fuse.gcsfuse"),
        ("/mnt/my bucket/disk/runs", ""),
        ("/mnt/stick", ""),
        ("/layers/root", ""),
        ("/mnt/windows", "cifs"),
    ],
)
def test_disks_of_other_machines_are_known(tmp_path, folder, kind):
    (tmp_path / "mounts").write_text(MOUNTS.lstrip())
    assert network_file_system(Path(folder), tmp_path / "mounts") == kind
    assert not network_file_system(Path(folder), tmp_path / "none")


def test_mlflows_sqlite_is_refused_on_a_network_file_system(tmp_path, monkeypatch):
    from sweep.tracking import store

    monkeypatch.setattr(store, "network_file_system", lambda folder: "nfs4")
    with pytest.raises(ConfigError, match=r"mlflow\.db' lies on a network file system \(nfs4\)"):
        store.reachable(f"sqlite:///{tmp_path}/new/mlflow.db")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        ("/home/me/runs", ""),
        ("/mnt/nfs4/runs", ""),
        ("/mnt/nfs3/runs", "NFS 3 keeps"),
        ("/mnt/alone/runs", "without locks"),
        ("/mnt/my bucket/runs", "fuse.gcsfuse passes none"),
        ("/mnt/my bucket/disk/runs", ""),
        ("/mnt/my bucketful", ""),
    ],
)
def test_file_systems_without_locks_between_machines_are_known(tmp_path, folder, why):
    (tmp_path / "mounts").write_text(MOUNTS.lstrip())
    found = passes_no_locks(Path(folder), tmp_path / "mounts")
    assert bool(found) == bool(why)
    assert why in found
    assert not passes_no_locks(Path(folder), tmp_path / "none")


def test_such_a_folder_is_refused_on_a_cluster_and_an_address_for_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "passes_no_locks", lambda folder: "of the test")
    check_storage(str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:1")
    with pytest.raises(ConfigError, match=r"storage_path='.*' lies where locks do not hold \(of"):
        check_storage(str(tmp_path))
    for key in ("runtime.ledger", "runtime.cache"):
        with pytest.raises(ConfigError, match=rf"{key}='gs://bucket/x' is an address"):
            load("core/configs/digits.yaml", {key: "gs://bucket/x"})
    with pytest.raises(ConfigError, match="run_dir='s3://bucket/x' is an address"):
        run(load("core/configs/digits.yaml"), "s3://bucket/x")


def test_a_folder_below_the_users_home_is_found_there(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load("core/configs/digits.yaml", {"runtime.ledger": "~/ledger"})
    assert config.runtime.ledger == "/home/me/ledger"
