"""Folder of a trial on the disks of its workers' machines, kept at the sweep's address."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import distributed
from core.config import Config, load
from core.errors import UserError
from core.record.folder import RunFolder
from sweep.config.address import on_this_machine, own_folder
from sweep.results.folder_copy import FolderCopy


@dataclass
class OwnFolder:
    """Where a worker has its trial.

    Attributes:
        path: of the run.
        config: of the run, on this machine.
        copy: of the folder; None where all machines see it.
        told: called on the first rank whenever the copy is newer.
    """

    path: Path
    config: Config
    copy: FolderCopy | None
    told: Callable[[], None]

    def keep(self, **patience: float) -> None:
        """Makes what the folder holds outlast this machine; called on the first rank alone."""
        if self.copy is not None:
            never = RunFolder(self.path).non_private.name
            self.copy.keep(self.path, lambda name: name.parts[0] == never, **patience)
            self.told()


@contextmanager
def own_folder_of(
    settings: dict[str, Any], is_first_here: bool, told: Callable[[], None]
) -> Iterator[OwnFolder]:
    """The folder of a trial, on each of its workers; entered by all ranks together.

    With an address it is a new one, into which the first rank fetches what the copy holds. What an
    earlier worker has left on this machine is not looked at: the copy is the record.

    Args:
        settings: of the worker, as the trial sends them.
        is_first_here: whether this is the first worker of the trial on its machine.
        told: as of `OwnFolder`.

    Raises:
        StorageError: the store does not answer.
    """
    path, config = Path(settings["run_dir"]), settings["config"]
    if (copy := settings["copy"]) is None:
        yield OwnFolder(path, load(config), None, told)
        return
    root = own_folder(settings["address"]) / ".workers" / settings["name"] / path.name
    if is_first_here:
        shutil.rmtree(root, ignore_errors=True)
    session = distributed.on_rank_0(copy.begin)  # All have removed what was there.
    place = root / session / path.name
    distributed.on_rank_0(lambda: copy.fetch(place))
    own = OwnFolder(place, on_this_machine(config, settings["address"]), copy, told)
    try:
        yield own
    except UserError:
        if distributed.rank() == 0:
            with suppress(UserError):  # Why it failed, if it is not the store itself.
                own.keep(patience=0)
        raise
    finally:
        if is_first_here:
            shutil.rmtree(root, ignore_errors=True)
