"""Release bundle of a run: synthetic images, generator and privacy card, never real images."""

import csv
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.config import Config
from core.data import Split
from core.errors import ConfigError
from core.generation.generator import GENERATOR, write_generator
from core.generation.png import encode_png, write_grid
from core.io.files import read_json, whole_folder, write_json
from core.privacy.accounting.rounding import upward
from core.privacy.ledger.account import ledger_of_run
from core.privacy.ledger.card import card_markdown, make_card
from core.privacy.plan.plan import resumed_plan
from core.publish.dataset_card import PARQUET, dataset_card, parquet_metadata
from core.publish.proven import audit_failures, bundled_bounds
from core.record.bundle import DIGESTS, digests
from core.record.folder import GRID, IMAGES, NON_PRIVATE, RunFolder, class_names

FORMATS = ("folder", "npz", "parquet", "generator")


def write_release(
    run_dir: Path,
    out: Path,
    config: Config,
    card: Mapping[str, Any],
    formats: Sequence[str],
    license_id: str = "unknown",
) -> Path:
    """Writes the bundle of a finished run into an empty folder.

    Args:
        run_dir: of a finished run; only its synthetic images and its averaged weights are read.
        out: folder to create.
        config: of the run.
        card: as of `release_card`; its scope decides which epsilon is held against the target.
        formats: any of `folder` (PNG by class), `npz`, `parquet` (loads with Hugging Face's
            `datasets`) and `generator` (weights, from which `core generate` draws more).
        license_id: what the dataset card states, such as `cc-by-4.0`.

    Returns:
        `out`.

    Raises:
        ConfigError: nothing to release, the target is exceeded, the audit proves more than is
            claimed, or `out` is not empty.

    Privacy: images and weights are functions of what the central images and DP-SGD released, and
        of nothing else that is private: post-processing, hence free. The weights are the EMA
        alone, under scope `selection` those of the selected trial. Scores stay behind, as they are
        computed from real images.
    """
    run = RunFolder(run_dir)
    if not run.images.exists():
        raise ConfigError(f"'{run_dir}' holds no synthetic images: finish the run first")
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ConfigError(f"format {unknown[:1]} is unknown: choose of {', '.join(FORMATS)}")
    if "parquet" in formats and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("parquet needs pyarrow: pip install pyarrow, or leave parquet out")
    if excess := excess_of(config, card):
        raise ConfigError(
            f"{excess}: nothing is written; raise privacy.target_epsilon before a run, never after"
        )
    if failures := audit_failures(run):
        raise ConfigError(f"{'; '.join(failures)}: nothing is written")
    for path in (run_dir, out):
        if NON_PRIVATE in path.resolve().parts:
            raise ConfigError(f"'{path}' lies in a folder '{NON_PRIVATE}', which is never released")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"'{out}' is not empty: name a new folder")
    synthetic = Split.read(run.images)
    classes = class_names(run_dir, config.dataset.num_classes)
    with whole_folder(out) as folder:
        if "folder" in formats:
            _write_folder(folder, synthetic, classes)
        if "npz" in formats:
            synthetic.write(folder / IMAGES)
        if "parquet" in formats:
            _write_parquet(folder, synthetic, classes)
        if "generator" in formats:
            write_generator(folder / GENERATOR, run.model, config, classes)
        write_grid(folder / GRID, synthetic.images, synthetic.labels)
        write_json(folder / "privacy_card.json", card)
        (folder / "privacy_card.md").write_text(card_markdown(card))
        text = dataset_card(card, len(synthetic.labels), classes, formats, license_id)
        (folder / "README.md").write_text(text, encoding="utf-8")
        write_json(folder / DIGESTS, digests(folder))
    return out


def excess_of(config: Config, card: Mapping[str, Any]) -> str:
    """How a release exceeds the target; empty if it does not."""
    target = config.privacy.target_epsilon
    by_trial = card["scope"] == "trial"
    claimed = card["epsilon_released_trial" if by_trial else "epsilon_released_with_selection"]
    if claimed <= target * (1 + 1e-9):
        return ""
    return f"this release spends epsilon {upward(claimed, 6)} of the target {upward(target, 6)}"


def release_card(config: Config, run_dir: Path) -> dict[str, Any]:
    """The privacy card of a finished run, from its ledger, and the bounds that its audit proved.

    Raises:
        ConfigError: the run is not finished, scope `selection` did not select it, or its plan is
            not that of its configuration, or states another epsilon than it spends.
        LedgerError: its ledger is missing or damaged.
    """
    if config.method == "non_private":
        raise ConfigError(
            f"'{run_dir}' holds a run of method=non_private, whose epsilon is infinite: nothing of "
            "it may be released; release a private run"
        )
    run = RunFolder(run_dir)
    if (result := run.result()) is None or result.is_stopped:
        name = run.evaluation.name
        raise ConfigError(f"'{run_dir}' holds no finished run (no {name}): finish it")
    chosen, objective = run.selected, "scores computed on real images, which are not private"
    if config.privacy.covers.covers_choice:  # Which refuses any other objective.
        objective = "scores that this guarantee covers, or that are public"
    if chosen.exists():
        objective = read_json(chosen)["objective"]
    elif config.privacy.covers.is_secret:
        raise ConfigError(
            f"'{run_dir}' was not selected, or its sweep is not complete: under scope selection "
            "only the best of all trials may leave, so finish the sweep and release that one"
        )
    card = make_card(
        ledger_of_run(config, run_dir, result.fingerprint),
        result.name,
        resumed_plan(config, run.plan()),
        config.privacy,
        result.identity,
        objective,
        searched=chosen.exists(),
    )
    return {**card, "audit": bundled_bounds(run)}


def _write_folder(out: Path, synthetic: Split, classes: Sequence[str]) -> None:
    width = len(str(len(synthetic.labels) - 1))
    with _open_new(out / "images" / "labels.csv") as file:
        table = csv.writer(file)
        table.writerow(("file", "label", "class"))
        pairs = zip(synthetic.images, synthetic.labels.tolist(), strict=True)
        for number, (image, label) in enumerate(pairs):
            path = out / "images" / str(label) / f"{number:0{width}d}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode_png(image))
            name = path.relative_to(out / "images").as_posix()
            table.writerow((name, label, classes[label]))


def _write_parquet(out: Path, synthetic: Split, classes: Sequence[str]) -> None:
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
    (out / PARQUET).parent.mkdir()
    parquet.write_table(table.replace_schema_metadata(parquet_metadata(classes)), out / PARQUET)


def _open_new(path: Path) -> Any:
    path.parent.mkdir(parents=True)
    return path.open("w", newline="", encoding="utf-8")
