"""Images are decoded once, shared, kept from others, and made anew when anything changes."""

import itertools
import multiprocessing
import os
import stat
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import TRAIN_IMAGES, write_idx
from published_files import write_eurosat

from core.config import DatasetConfig
from core.data import cache as data_cache
from core.data import load_dataset
from core.data.parallel import by_processes, on_all_cores
from core.errors import ConfigError, DataError
from core.io.locks import locked

DIGITS = "9ae3f0999eff23cc78ebb41f524c2b8c527b93c46c09c0b823b34fbc4a932f4b"


def config(folder: Path, **changes: object) -> DatasetConfig:
    settings = {"name": "idx", "image_size": 6, "num_classes": 3, "num_examples": 30} | changes
    return DatasetConfig(path=str(folder), **settings)  # type: ignore[arg-type]


@pytest.fixture
def decoded(monkeypatch):
    """Counts how often anything is written to a cache."""
    calls: list[str] = []
    write = data_cache._write

    def counted(source, settings, folder, report):
        calls.append(folder.name)
        write(source, settings, folder, report)

    monkeypatch.setattr(data_cache, "_write", counted)
    return calls


def test_the_fingerprint_that_ledgers_are_named_by_never_changes(tmp_path):
    assert load_dataset(DatasetConfig()).fingerprint == DIGITS
    assert load_dataset(DatasetConfig(), tmp_path).fingerprint == DIGITS


@pytest.mark.parametrize("size", [6, 4])
def test_cached_images_are_those_decoded_into_memory(tmp_path, decoded, size):
    write_idx(tmp_path / "data")
    settings, cache = config(tmp_path / "data", image_size=size), tmp_path / "cache"
    memory = load_dataset(settings)
    for _ in range(3):
        mapped = load_dataset(settings, cache)
        for ours, theirs in ((mapped.train, memory.train), (mapped.test, memory.test)):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
        assert mapped.fingerprint == memory.fingerprint
    assert len(decoded) == 1


def test_a_write_to_the_images_stays_in_its_process(tmp_path):
    write_idx(tmp_path / "data")
    first = load_dataset(config(tmp_path / "data"), tmp_path / "cache")
    first.train.images.zero_()
    assert load_dataset(config(tmp_path / "data"), tmp_path / "cache").train.images.sum() > 0


def test_who_waits_for_the_cache_waits_so_long_and_says_for_whom(tmp_path, monkeypatch):
    write_idx(tmp_path / "data")
    load_dataset(config(tmp_path / "data"), tmp_path / "cache")
    monkeypatch.setattr(data_cache, "_LOCK_TIMEOUT_S", 0.01)
    (lock,) = (tmp_path / "cache").glob("*.lock")
    with (
        locked(lock),
        pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()} on "),
    ):
        load_dataset(config(tmp_path / "data"), tmp_path / "cache")


def test_what_is_private_is_for_its_owner_alone(tmp_path):
    write_idx(tmp_path / "data")
    before = os.umask(0)
    try:
        load_dataset(config(tmp_path / "data"), tmp_path / "cache")
    finally:
        os.umask(before)
    cache = tmp_path / "cache"
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in (cache, *cache.rglob("*"))}
    assert len(modes) == 9
    for path, mode in modes.items():
        if path.suffix != ".lock":
            assert mode == (0o700 if path.is_dir() else 0o600), path


def test_another_source_or_transform_is_decoded_anew(tmp_path, decoded):
    write_idx(tmp_path / "data")
    cache = tmp_path / "cache"
    load_dataset(config(tmp_path / "data"), cache)
    load_dataset(config(tmp_path / "data", image_size=4), cache)
    path = tmp_path / "data" / TRAIN_IMAGES
    content = bytearray(path.read_bytes())
    content[99] ^= 1
    path.write_bytes(content)
    changed = load_dataset(config(tmp_path / "data"), cache)
    assert len(set(decoded)) == len(decoded) == 3
    assert torch.equal(changed.train.images, load_dataset(config(tmp_path / "data")).train.images)
    write_idx(tmp_path / "elsewhere", train_images=np.ones((30, 6, 6)))
    assert (load_dataset(config(tmp_path / "elsewhere"), cache).train.images == 1).all()


def test_many_files_are_known_by_their_last_change(tmp_path, decoded):
    write_eurosat(tmp_path / "data", each=54)
    facts = {"name": "eurosat", "image_size": 8, "channels": 3, "num_classes": 2}
    settings = config(tmp_path / "data", **facts, num_examples=92)
    for _ in range(2):
        load_dataset(settings, tmp_path / "cache")
    assert len(decoded) == 1
    path = next((tmp_path / "data").rglob("*.jpg"))
    path.write_bytes(path.read_bytes())
    load_dataset(settings, tmp_path / "cache")
    assert len(decoded) == 2


@pytest.mark.parametrize("change", ["code", "torch"])
def test_images_that_other_code_decoded_are_not_taken(tmp_path, decoded, monkeypatch, change):
    """A run's identity names the code: with older pixels, its noise would fall on another sum."""
    write_idx(tmp_path / "data")
    load_dataset(config(tmp_path / "data"), tmp_path / "cache")
    if change == "code":
        monkeypatch.setattr(data_cache, "data_code_digest", lambda: "other")
    else:
        monkeypatch.setattr(torch, "__version__", "0.0")
    load_dataset(config(tmp_path / "data"), tmp_path / "cache")
    assert len(set(decoded)) == len(decoded) == 2


@pytest.mark.parametrize("harm", ["truncated", "missing", "labels", "names"])
def test_a_damaged_cache_is_made_anew(tmp_path, decoded, harm):
    write_idx(tmp_path / "data")
    cache = tmp_path / "cache"
    whole = load_dataset(config(tmp_path / "data"), cache)
    kept = whole.train.images.clone()
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    path = folder / "training_images.npy"
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif harm == "missing":
        (folder / "fingerprint").unlink()
    elif harm == "names":
        (folder / "class_names").write_text('["0", ')
    else:
        np.save(folder / "training_labels.npy", np.zeros(3, np.int64))
    assert torch.equal(load_dataset(config(tmp_path / "data"), cache).train.images, kept)
    assert len(decoded) == 2


def test_a_damaged_source_leaves_nothing_behind(tmp_path):
    write_eurosat(tmp_path / "data", each=7)
    path = sorted((tmp_path / "data").rglob("*.jpg"))[-1]
    path.write_bytes(b"no image")
    facts = {"name": "eurosat", "image_size": 8, "channels": 3, "num_classes": 2}
    with pytest.raises(DataError, match=path.name):
        load_dataset(config(tmp_path / "data", **facts, num_examples=12), tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path):
    write_idx(tmp_path / "data")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"set runtime\.cache to another folder"):
        load_dataset(config(tmp_path / "data"), tmp_path / "cache")


def _load(folder: str, cache: str, start: threading.Event, sums: object) -> None:
    start.wait()
    images = load_dataset(config(Path(folder)), Path(cache)).train.images
    sums.put(int(images.sum()))  # type: ignore[attr-defined]


def test_processes_that_ask_at_once_share_one_copy(tmp_path):
    write_idx(tmp_path / "data")
    context = multiprocessing.get_context("fork")
    start, sums = context.Event(), context.Queue()
    arguments = (str(tmp_path / "data"), str(tmp_path / "cache"), start, sums)
    processes = [context.Process(target=_load, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    found = {sums.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert found == {int(load_dataset(config(tmp_path / "data")).train.images.sum())}
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(folders) == 1


def test_what_all_cores_compute_comes_in_order_and_raises_in_its_place():
    def work(number: int) -> int:
        time.sleep(0.01 * (number % 3 == 0))
        if number == 50:
            raise ValueError(number)
        return number * torch.get_num_threads()

    before, seen = torch.get_num_threads(), []
    with pytest.raises(ValueError, match="50"):
        seen.extend(on_all_cores(work, itertools.count()))
    found = []
    for value in on_all_cores(work, range(50)):
        found.append(value)
    assert found == [*range(50)]
    assert torch.get_num_threads() == before


def doubled(number: int) -> tuple[int, int]:
    if number == 500:
        raise DataError("500 is damaged")
    return 2 * number, os.getpid()


def broken_at(last: int) -> Iterator[int]:
    yield from range(last)
    raise DataError("the list is damaged")


def test_what_processes_compute_comes_in_order_and_raises_in_its_place():
    before = torch.random.get_rng_state()
    found = [*by_processes(doubled, partial(range, 450))]
    assert [value for value, _ in found] == [*range(0, 900, 2)]
    assert len({process for _, process in found} - {os.getpid()}) == min(
        8, len(os.sched_getaffinity(0))
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    seen = []
    with pytest.raises(DataError, match=r"^500 is damaged$"):
        seen.extend(by_processes(doubled, itertools.count))
    assert 500 - 64 <= len(seen) <= 500
    with pytest.raises(DataError, match=r"^the list is damaged$"):
        [*by_processes(doubled, partial(broken_at, 300))]
    assert not multiprocessing.active_children()


def test_few_items_start_no_process():
    assert {process for _, process in by_processes(doubled, partial(range, 63))} == {os.getpid()}
    assert [*by_processes(doubled, partial(range, 0))] == []


def noted(number: int, folder: Path) -> np.ndarray:
    (folder / str(number)).touch()
    return np.zeros(2**24, np.uint8)


def test_few_large_results_wait_in_each_process(tmp_path):
    """Two chunks of 64 photographs of a dozen megapixels would be 4.6 GB in each."""
    results = by_processes(partial(noted, folder=tmp_path), itertools.count)
    for _ in range(65):
        next(results)
    time.sleep(2)  # In which the processes go on as far as they may.
    assert 64 < len([*tmp_path.iterdir()]) <= 64 + 3 * 2 * min(8, len(os.sched_getaffinity(0)))
    results.close()


def large(number: int) -> bytes:
    return bytes(2**20)


def compute_until_killed(processes: "multiprocessing.Queue[int]") -> None:
    for _ in by_processes(large, itertools.count):
        for child in multiprocessing.active_children():
            processes.put(child.pid or 0)


def test_processes_end_with_a_parent_that_is_killed():
    """Although each waits for room in the pipe that nobody reads any more."""
    fork = multiprocessing.get_context("fork")
    processes = fork.Queue()
    parent = fork.Process(target=compute_until_killed, args=(processes,))
    parent.start()
    children = {processes.get(timeout=60) for _ in range(200)}
    parent.kill()
    parent.join()
    assert children
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.2)
