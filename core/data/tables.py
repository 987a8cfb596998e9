"""Readers of data sets with tables of labels: CelebA and Camelyon17."""

import codecs
import csv
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

from core.config import DatasetConfig
from core.data.folders import records
from core.data.published import digests_of
from core.data.records import Parts, Source, existing, folder_of, names_of
from core.errors import DataError

Items = list[tuple[Path, int]]
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CAMELYON_TEST_CENTER, _CAMELYON_VALIDATION_CENTER = 2, 1


def celeba(config: DatasetConfig) -> Source:
    """The aligned faces of CelebA (Liu et al. 2015) in its own split; label 1 is `Male`.

    Of the tables only attributes and partition are read: the published text files, or Kaggle's
    copies (`.csv`). Everything may lie below `celeba/`, as torchvision has it, or not.
    """
    folder = folder_of(config)
    base = folder / "celeba" if (folder / "celeba").is_dir() else folder
    pictures = existing(base / "img_align_celeba", config)
    if (pictures / pictures.name).is_dir():  # As Kaggle's archive is unpacked.
        pictures /= pictures.name
    attributes, partition = (
        csv_file if (csv_file := base / f"{name}.csv").exists() else base / f"{name}.txt"
        for name in ("list_attr_celeba", "list_eval_partition")
    )
    male = _column(existing(attributes, config), "Male", ("-1", "1"))
    part = _column(existing(partition, config), "partition", ("0", "1", "2"))
    if odd := sorted(male.keys() ^ part.keys()):
        raise DataError(
            f"'{odd[0]}' is in one of '{attributes}' and '{partition}' alone: fetch both again"
        )
    train, test = (
        [(pictures / name, int(male[name] == "1")) for name in male if part[name] == split]
        for split in ("0", "2")
    )
    return _source(train, test, (attributes, partition), ("not Male", "Male"), config)


def camelyon17(config: DatasetConfig) -> Source:
    """The 96x96 patches of Camelyon17-WILDS (Koh et al. 2021) in its official split.

    Label 1 is tumour tissue in the central 32x32 pixels. As in the package `wilds`, the split
    column holds for all hospitals but the two that are held out, of which number 2 tests.
    """
    folder = folder_of(config)
    table = existing(folder / "metadata.csv", config)
    columns = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
    train: Items = []
    test: Items = []
    seen: set[Path] = set()
    for number, row in enumerate(_rows(table, columns), start=2):
        try:
            # Spreadsheets take the zeros from 004.
            place = f"patient_{int(row['patient']):03d}_node_{row['node']}"
            name = f"patch_{place}_x_{row['x_coord']}_y_{row['y_coord']}.png"
            item = (folder / "patches" / place / name, int(row["tumor"]))
            center, split = int(row["center"]), int(float(row["split"]))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"line {number} of '{table}' cannot be read ({error!r}): fetch it again"
            ) from None
        if item[0] in seen:  # One record would count as two.
            raise DataError(f"line {number} of '{table}' names '{name}' again: fetch it again")
        seen.add(item[0])
        if center == _CAMELYON_TEST_CENTER:
            test.append(item)
        elif center != _CAMELYON_VALIDATION_CENTER and split == 0:
            train.append(item)
    return _source(train, test, (table,), ("no tumor", "tumor"), config)


def _source(
    train: Items,
    test: Items,
    tables: tuple[Path, ...],
    class_names: tuple[str, ...],
    config: DatasetConfig,
) -> Source:
    def read() -> Parts:
        kept, held_out = (records(items, tables[0], config) for items in (train, test))
        return Parts(kept, held_out, names_of(class_names, config))

    return Source((*tables, *(path for path, _ in (*train, *test))), read)


def _column(path: Path, column: str, allowed: tuple[str, ...]) -> dict[str, str]:
    """One column of a table of CelebA by file name.

    Raises:
        DataError: the text file is not the published one, whatever its line ends; a row is odd.
    """
    if path.suffix == ".txt":
        text = _text(path)
        published = digests_of("celeba")[f"celeba/{path.name}"]
        found = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
        if found != published:
            raise DataError(
                f"'{path}' is damaged: its MD5 is {found}, not the published {published}; fetch "
                "it again"
            )
        lines = [line.split() for line in text.splitlines()]
        if column == "partition":
            pairs = [(line[0], line[1]) for line in lines]
        else:
            place = lines[1].index(column) + 1
            pairs = [(line[0], line[place]) for line in lines[2:]]
    else:
        pairs = [
            (row["image_id"], str(row[column]).strip()) for row in _rows(path, ("image_id", column))
        ]
    values: dict[str, str] = {}
    for name, value in pairs:
        if value not in allowed or name in values or Path(name).name != name:
            raise DataError(
                f"'{path}' says {column}={value} of '{name}', which must be there once and with "
                f"one of {', '.join(allowed)}: fetch it again"
            )
        values[name] = value
    return values


def _text(path: Path) -> str:
    """A text file with line ends of one character.

    Raises:
        DataError: it cannot be read, or is in an encoding without a mark.
    """
    try:
        content = path.read_bytes()
        encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
        text = content.decode(encoding)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror}): fetch it again") from None
    except UnicodeDecodeError:
        raise DataError(
            f"'{path}' is not in UTF-8 (perhaps Latin-1 or damaged): save it as UTF-8, or fetch "
            "it again"
        ) from None
    if "\0" in text:
        raise DataError(f"'{path}' is not in UTF-8 (perhaps UTF-16): save it as UTF-8")
    return text.replace("\r\n", "\n")


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Rows of a table with commas, as long as they have these columns."""
    reader = csv.DictReader(io.StringIO(_text(path)), strict=True)
    try:
        if missing := next((name for name in columns if name not in (reader.fieldnames or ())), ""):
            raise DataError(
                f"'{path}' has no column '{missing}' in its first line: separate columns by "
                "commas, or fetch it again"
            )
        yield from reader
    except csv.Error as error:
        raise DataError(
            f"'{path}' is no table near line {reader.line_num} ({error}): fetch it again"
        ) from None
