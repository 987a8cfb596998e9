"""The release bundle of a run: synthetic images and the privacy card, never real images."""

import csv
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.config import Config
from core.data import Split
from core.errors import ConfigError
from core.privacy.card import card_markdown, make_card
from core.privacy.ledger import Ledger, ledger_path
from core.privacy.plan import PrivacyPlan
from core.reporting import encode_png, write_grid, write_json

FORMATS = ("folder", "npz", "parquet")
SELECTED = "selected.json"
"""What a complete sweep leaves in the folder of its best trial: the objective that chose it."""


def write_release(
    run_dir: Path, out: Path, card: Mapping[str, Any], target_epsilon: float, formats: Sequence[str]
) -> Path:
    """Writes the bundle of a finished run into an empty folder.

    Args:
        run_dir: of a finished run; only its synthetic images are read.
        out: folder to create.
        card: as of `make_card`; its scope decides which epsilon is held against the target.
        target_epsilon: what the publication may spend.
        formats: any of `folder` (PNG by class), `npz`, `parquet`.

    Returns:
        `out`.

    Raises:
        ConfigError: nothing to release, the target is exceeded, or `out` is not empty.

    Privacy: synthetic images are post-processing of a private model; scores stay behind, as they
        are computed from real images.
    """
    stored = run_dir / "synthetic" / "images.npz"
    if not stored.exists():
        raise ConfigError(f"'{run_dir}' holds no synthetic images: finish the run first")
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ConfigError(f"format {unknown[:1]} is unknown: choose of {', '.join(FORMATS)}")
    if "parquet" in formats and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("parquet needs pyarrow: pip install pyarrow, or leave parquet out")
    released = "epsilon_trial" if card["scope"] == "trial" else "epsilon_released_with_selection"
    claimed = card[released]
    if claimed > target_epsilon * (1 + 1e-9):
        raise ConfigError(
            f"this release spends epsilon {claimed:.6g} of the target {target_epsilon:g}: nothing "
            "is written; raise privacy.target_epsilon before a run, never after it"
        )
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"'{out}' is not empty: name a new folder")
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with np.load(stored) as arrays:
        synthetic = Split(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]))
    writers = {"folder": _write_folder, "npz": _write_npz, "parquet": _write_parquet}
    for name in formats:
        writers[name](temporary, synthetic)
    write_grid(temporary / "grid.png", synthetic.images, synthetic.labels)
    write_json(temporary / "privacy_card.json", card)
    (temporary / "privacy_card.md").write_text(card_markdown(card))
    _write_digests(temporary)
    if out.exists():
        out.rmdir()
    temporary.replace(out)
    return out


def release_card(config: Config, run_dir: Path) -> dict[str, Any]:
    """The privacy card of a finished run, from its ledger.

    Raises:
        ConfigError: the run is not finished, or scope `selection` did not select it.
        LedgerError: its ledger is missing or damaged.
    """
    if config.method == "non_private":
        raise ConfigError(
            f"'{run_dir}' holds a run of method=non_private, whose epsilon is infinite: nothing of "
            "it may be released; release a private run"
        )
    path = run_dir / "evaluation.json"
    if not path.exists():
        raise ConfigError(f"'{run_dir}' holds no finished run (no evaluation.json): finish it")
    result = json.loads(path.read_text())
    chosen, objective = run_dir / SELECTED, "scores computed on real images, which are not private"
    if chosen.exists():
        objective = json.loads(chosen.read_text())["objective"]
    elif config.privacy.scope == "selection":
        raise ConfigError(
            f"'{run_dir}' was not selected, or its sweep is not complete: under scope selection "
            "only the best of all trials may leave, so finish the sweep and release that one"
        )
    return make_card(
        Ledger.at(ledger_path(Path(config.runtime.ledger), result["fingerprint"])),
        result["name"],
        PrivacyPlan.restored(json.loads((run_dir / "privacy.json").read_text())),
        config.privacy,
        result["identity"],
        objective,
    )


def verify_release(folder: Path) -> int:
    """Checks every file of a bundle against its digest; returns the number of files.

    Raises:
        ConfigError: a file is missing, changed or was added.
    """
    try:
        stated: dict[str, str] = json.loads((folder / "digests.json").read_text())
    except (OSError, ValueError):
        raise ConfigError(f"'{folder}' is no release: it holds no digests.json") from None
    found = _digests(folder)
    for name in sorted(set(stated) | set(found)):
        if stated.get(name) != found.get(name):
            state = "missing" if name not in found else "not listed"
            state = "changed" if name in stated and name in found else state
            raise ConfigError(f"'{folder / name}' is {state}: this is not the bundle as released")
    return len(found)


def _write_folder(out: Path, synthetic: Split) -> None:
    width = len(str(len(synthetic.labels) - 1))
    with _open_new(out / "images" / "labels.csv") as file:
        table = csv.writer(file)
        table.writerow(("file", "label"))
        pairs = zip(synthetic.images, synthetic.labels.tolist(), strict=True)
        for number, (image, label) in enumerate(pairs):
            path = out / "images" / str(label) / f"{number:0{width}d}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode_png(image))
            table.writerow((path.relative_to(out / "images").as_posix(), label))


def _write_npz(out: Path, synthetic: Split) -> None:
    images, labels = synthetic.images.numpy(), synthetic.labels.numpy()
    np.savez_compressed(out / "images.npz", images=images, labels=labels)


def _write_parquet(out: Path, synthetic: Split) -> None:
    import pyarrow
    from pyarrow import parquet

    images = [{"bytes": encode_png(image), "path": None} for image in synthetic.images]
    table = pyarrow.table(
        {
            "image": pyarrow.array(
                images,
                pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
            ),
            "label": pyarrow.array(synthetic.labels.numpy()),
        }
    )
    parquet.write_table(table, out / "images.parquet")


def _open_new(path: Path) -> Any:
    path.parent.mkdir(parents=True)
    return path.open("w", newline="")


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "digests.json"
    }


def _write_digests(folder: Path) -> None:
    write_json(folder / "digests.json", _digests(folder))
