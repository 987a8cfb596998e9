"""Files are whole or absent, whatever happens while they are written."""

import os
from functools import partial
from pathlib import Path

import pytest

from core.io.files import whole_folder, write_first, write_whole


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("by_many", [False, True])
def test_a_file_is_as_it_was_where_its_writer_fails(tmp_path, by_many):
    def fail(file) -> None:
        file.write(b"half")
        raise ZeroDivisionError

    path = tmp_path / "deeper" / "file"
    write_whole(path, "whole", by_many=by_many)
    with pytest.raises(ZeroDivisionError):
        write_whole(path, fail, by_many=by_many)
    assert path.read_text() == "whole"
    write_whole(path, lambda file: file.write(b"new"), by_many=by_many)
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("write", [write_whole, write_first])
def test_a_file_and_its_name_are_on_the_disk_when_the_call_returns(tmp_path, monkeypatch, write):
    synced, fsync = [], os.fsync

    def noting(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert len(synced) < 2 or (tmp_path / "file").exists()  # The folder last.
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    write(tmp_path / "file", "text")
    assert synced[-1] == str(tmp_path)
    assert len(synced) == 2


@pytest.mark.parametrize("write", [partial(write_whole, by_many=True), write_first])
def test_processes_of_the_same_number_on_two_hosts_never_share_half_a_file(
    tmp_path, monkeypatch, write
):
    used, opened = [], os.open

    def noting(path: str, flags: int, mode: int = 0) -> int:
        used.append(str(path))
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", noting)
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "file", "text")
    assert len({Path(each).name for each in used if each.endswith(".tmp")}) == 2


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    write_whole(tmp_path / "file", "whole")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", "more than fits")
    assert (tmp_path / "file").read_text() == "whole"
    assert names(tmp_path) == ["file"]


def test_private_files_are_their_owner_s_alone_whatever_the_umask(tmp_path):
    old = os.umask(0)
    try:
        write_whole(tmp_path / "new" / "file", "text", private=True)
        write_first(tmp_path / "first", "text")
        with whole_folder(tmp_path / "folder", private=True):
            pass
    finally:
        os.umask(old)
    for place, mode in (("new", 0o700), ("new/file", 0o600), ("first", 0o600), ("folder", 0o700)):
        assert (tmp_path / place).stat().st_mode & 0o777 == mode


def test_the_first_writer_decides_for_good(tmp_path):
    for content in ("first", "second"):
        write_first(tmp_path / "file", content)
    assert (tmp_path / "file").read_text() == "first"
    assert names(tmp_path) == ["file"]


def test_a_folder_is_whole_or_absent(tmp_path):
    def fail() -> None:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == []
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
    assert names(tmp_path) == ["out"]
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "file").read_text() == "whole"
