"""`python -m core prepare`: where a data set comes from, and what must lie where to be read."""

import argparse
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import DatasetConfig, load_yaml
from core.data.published import CELEBA_TABLES, CLASSES, digests_of, torchvision_class
from core.data.tables import celeba
from core.errors import ConfigError, DataError


@dataclass(frozen=True)
class Origin:
    """What is known of a public data set.

    Attributes:
        text: what it is and where it is published.
        url: where it is fetched from.
        folder: below the folder given: what `dataset.path` must name.
        layout: files below that folder, in words.
        reader: `dataset.name`.
        preset: of its runs.
    """

    text: str
    url: str
    folder: str
    layout: str
    reader: str
    preset: str


ORIGINS = {
    name: Origin(**each)
    for name, each in load_yaml(Path(__file__).with_name("data_sets.yaml")).items()
}
_CAMELYON_BYTES = 10_658_709_504


def prepare(options: argparse.Namespace) -> None:
    """Says where a data set comes from, fetches what is missing, checks the published digests.

    Raises:
        DataError: it can neither be found nor fetched; what to place where was printed before.
    """
    name, out = options.dataset, options.out
    if name not in ORIGINS:
        raise ConfigError(f"--dataset {name} is unknown: choose of {', '.join(ORIGINS)}")
    origin = ORIGINS[name]
    folder = out / origin.folder
    print(f"{origin.text}\nfrom   {origin.url}\nlayout {folder}: {origin.layout}")
    for file, md5 in _digests(name).items():
        print(f"       MD5 {md5}  {out / file}")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if name == "camelyon17":
            _fetch_camelyon(origin, out)
        elif name != "celeba" or not _has_celeba(out):
            _fetch(name, out)
    except Exception as error:  # Networks and archives fail in many ways.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        for path in missing:  # Of what was made, an empty folder is not left.
            with suppress(OSError):
                path.rmdir()
        raise DataError(
            f"{name} cannot be had from here ({reason}): fetch it elsewhere, place the files as "
            f"listed above below '{out}', and run the same command again"
        ) from None
    print(f"ready  dataset.path={folder}")
    print(f"next   python -m core run --config core/configs/{origin.preset}.yaml ", end="")
    print(f"dataset.path={folder}")


def _digests(name: str) -> dict[str, str]:
    """Published MD5 by path below the folder given; none for sets of single images."""
    if name in ("mnist", "fashion_mnist"):
        kind = torchvision_class(name)
        return {f"{ORIGINS[name].folder}/{file}": md5 for file, md5 in kind.resources}
    if name == "eurosat":
        return {"eurosat/EuroSAT.zip": "c8fa014336c82ac7804f0398fcb19387"}
    if name == "camelyon17":
        return {}
    archive = {"celeba/img_align_celeba.zip": "00d2c5bc6d35e252742224ab0c1e8fcb"}
    return {**digests_of(name), **(archive if name == "celeba" else {})}


def _fetch(name: str, out: Path) -> None:
    """Downloads by torchvision what is not there; it checks each archive's digest."""
    kind: Any = torchvision_class(name)
    assert name in CLASSES
    _refuse_damaged(name, out)
    _fetch_celeba(out / "celeba") if name == "celeba" else kind(str(out), download=True)
    _refuse_damaged(name, out)


def _has_celeba(out: Path) -> bool:
    """Whether what is read of CelebA lies there, in whichever layout its reader takes."""
    try:
        celeba(DatasetConfig(name="celeba", path=str(out), channels=3, num_classes=2))
    except DataError:
        return False
    return True


def _fetch_celeba(folder: Path) -> None:
    """What is missing of the pictures and of the tables that are read; torchvision fetches all."""
    from torchvision.datasets import celeba as published
    from torchvision.datasets.utils import extract_archive

    archive = folder / "img_align_celeba.zip"
    for number, md5, file in published.CelebA.file_list:
        place = folder / "img_align_celeba" if file == archive.name else folder / file
        if file in (*CELEBA_TABLES, archive.name) and not place.exists():
            published.download_file_from_google_drive(number, str(folder), file, md5)
    if not (folder / "img_align_celeba").exists():
        extract_archive(str(archive))


def _refuse_damaged(name: str, out: Path) -> None:
    from torchvision.datasets.utils import check_integrity

    for file, md5 in _digests(name).items():
        path = out / file
        if path.exists() and not check_integrity(path, md5):
            raise DataError(f"'{path}' is damaged, as its MD5 is not {md5}; remove it")


def _fetch_camelyon(origin: Origin, out: Path) -> None:
    from torchvision.datasets.utils import download_url, extract_archive

    folder = out / origin.folder
    if (folder / "metadata.csv").exists():
        return
    archive = out / "camelyon17_v1.0.tar.gz"
    if not archive.exists():
        download_url(origin.url.split(" ")[0], str(out), archive.name)
    if (size := archive.stat().st_size) != _CAMELYON_BYTES:
        raise DataError(f"'{archive}' has {size} bytes, not {_CAMELYON_BYTES}; remove it")
    extract_archive(str(archive), str(folder))
