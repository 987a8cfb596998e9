"""Program that keeps a folder until it is killed: `folder_writer.py ADDRESS FOLDER`."""

import sys
from itertools import count
from pathlib import Path

from sweep.results.folder_copy import FolderCopy


def fill(folder: Path, version: int) -> None:
    """Two files that belong together, one that is as it was, one that comes and goes."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "same").write_text("same")
    (folder / "number").write_text(str(version))
    (folder / "sub" / "large").write_bytes(str(version).encode() * 3_000_000)
    (folder / "sub" / "odd").unlink(missing_ok=True)
    if version % 2:
        (folder / "sub" / "odd").write_text("")


def writer(address: str, launch: int = 1) -> FolderCopy:
    copy = FolderCopy(address, launch)
    copy.begin()
    return copy


if __name__ == "__main__":
    copy, folder = writer(sys.argv[1]), Path(sys.argv[2])
    for version in count(1):
        fill(folder, version)
        copy.keep(folder)
        print(version, flush=True)
