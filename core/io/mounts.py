"""File systems: whether locks hold between machines, and whether the disk is another's."""

import re
from pathlib import Path

_TABLE = Path("/proc/self/mountinfo")
_NETWORK = re.compile(
    r"nfs|cifs|smb|ceph|gluster|lustre|gpfs|beegfs|afs|fuse(?!blk|\.fuse-overlayfs)"
)


def passes_no_locks(folder: Path, table: Path = _TABLE) -> str:
    """Why locks in a folder do not hold between machines; empty if nothing speaks against it.

    Args:
        table: of the mounts, as Linux shows it; where there is none, nothing is known.
    """
    if not table.exists():
        return ""
    kind, options = _mount_of(folder.resolve(), table.read_text())
    if kind.startswith("fuse"):
        return f"{kind} passes none between machines"
    if kind.startswith("nfs") and "vers=3" in options:
        return "NFS 3 keeps those of a machine that vanishes for ever"
    if kind.startswith("nfs") and (
        "nolock" in options or {"local_lock=all", "local_lock=flock"} & {*options}
    ):
        return "it is mounted without locks between machines (nolock, local_lock)"
    return ""


def network_file_system(folder: Path, table: Path = _TABLE) -> str:
    """Type of the file system of a folder, if its disk may be another machine's; else empty."""
    kind = _mount_of(folder.resolve(), table.read_text())[0] if table.exists() else ""
    return kind if _NETWORK.match(kind) else ""


def _mount_of(folder: Path, table: str) -> tuple[str, list[str]]:
    """Type and options of the file system that holds the folder."""
    found: tuple[int, str, list[str]] = (-1, "", [])
    for line in table.splitlines():
        about, _, system = line.partition(" - ")
        place = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), about.split()[4])
        if folder.is_relative_to(place) and len(place) >= found[0]:  # The last one lies on top.
            kind, _, options = system.split(" ", 2)
            found = (len(place), kind, [*about.split()[5].split(","), *options.split(",")])
    return found[1], found[2]
