"""Commands of `python -m core` that load torch: a run, and what is made of its folder."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from core.config import Config, default_ledger, load, nested, parse_overrides, short_digest
from core.data import Dataset, Split, load_dataset
from core.device import config_device
from core.diffusion.posthoc_ema import reconstruct
from core.errors import ConfigError, LedgerError
from core.evaluation.scoring import score
from core.generation.draw import generate as draw_images
from core.generation.generator import Generator, finished_config, load_run
from core.generation.png import write_grid
from core.io.files import to_json
from core.io.terminal import Console
from core.pipeline.single import run as run_alone
from core.privacy.accounting.rounding import figure, upward
from core.privacy.keys import MasterSecret
from core.privacy.ledger.account import require_same_data
from core.privacy.ledger.card import ledger_text
from core.privacy.ledger.durable_copy import DurableCopy
from core.privacy.ledger.file import accept_loss, keep_copy
from core.privacy.ledger.ledger import Ledger
from core.privacy.ledger.sources import Sources, known_ledgers
from core.publish.inspection import inspect_run
from core.publish.release import release_card, write_release
from core.publish.review import review
from core.record.bundle import verify_release
from core.record.folder import RunFolder


def run(options: argparse.Namespace) -> None:
    """Trains, generates and scores one model."""
    config = load(options.config, parse_overrides(options.overrides))
    run_dir = options.run_dir or run_dir_of(options.config, config)
    outcome = run_alone(config, run_dir, options.verbosity)
    print("\n".join(result_lines(outcome.folder, outcome.report)))
    print(f"samples: {outcome.folder.grid}")


def result_lines(folder: RunFolder, result: Mapping[str, Any]) -> list[str]:
    """What a run has cost, by its plan alone, and its scores, each with its tag."""
    tags = ended.tags if (ended := folder.result()) else {}
    figures = {name: value for name, value in result.items() if isinstance(value, float)}
    seconds = figures.pop("seconds")
    costs = [name for name in figures if name.startswith("epsilon") or name == "noise_multiplier"]
    lines = [folder.plan().statement, "Costs follow from the plan alone, and are public:"]
    lines += [f"  {name:<18} {figure(name, figures.pop(name))}" for name in costs]
    lines += ["Scores are computed from real images:"]
    lines += [
        f"  {name:<18} {figure(name, value):<8} {tags.get(name, 'non-private')}"
        for name, value in figures.items()
    ]
    return [*lines, f"time: {seconds:.0f} s"]


def compare(options: argparse.Namespace) -> None:
    """Runs a configuration, plain DP-SGD and the named methods at the same budget."""
    config = load(options.config, parse_overrides(options.overrides))
    if config.is_plain:
        raise ConfigError(
            f"stage_split={config.stage_split:g} has no easy stage to compare: set it in (0, 1)"
        )
    plain = {"method": "dpdm"} if config.uses_moments else {"stage_split": 0.0}
    others = [{"method": name} for name in options.methods.split(",") if name]
    baselines = [load(nested(config), changes) for changes in (plain, *others)]
    rows: list[tuple[Config, Path, dict[str, Any]]] = []
    for each in (config, *baselines):
        run_dir = run_dir_of(options.config, each)
        run = f"method={each.method} stage_split={each.stage_split:g}"
        print(f"{run}: {run_dir}", file=sys.stderr, flush=True)
        rows.append((each, run_dir, run_alone(each, run_dir).report))
    print(RunFolder(rows[0][1]).plan().statement)
    print("Scores are computed from real images and are not private.")
    metric = next(name for name in rows[0][2] if name.startswith("fid"))
    print(
        f"{'method':<11} {'stage_split':>11} {'steps':>6} {'DP-SGD steps':>13} {'epsilon':>8} "
        f"{'noise multiplier':>17} {'accuracy':>9} {metric:>8} {'seconds':>8}  samples"
    )
    for each, run_dir, result in rows:
        print(
            f"{each.method:<11} {each.stage_split:>11g} "
            f"{each.warm_up_steps + each.private_steps:>6} "
            f"{each.private_steps:>13} "
            f"{upward(result['epsilon']):>8} {result['noise_multiplier']:>17.4f} "
            f"{result['accuracy']:>9.4f} {result[metric]:>8.4g} {result['seconds']:>8.0f}  "
            f"{RunFolder(run_dir).grid}"
        )


def run_dir_of(path: str, config: Config) -> Path:
    """The same command names the same folder, so it goes on where it was stopped."""
    return Path("runs") / f"{Path(path).stem}-{short_digest(config)}"


def ledger(options: argparse.Namespace) -> None:
    """Shows, verifies or restores the ledgers of a folder, or accepts that lines are lost."""
    if options.action == "accept-loss":
        if options.file is None:
            raise ConfigError("name the lost or damaged ledger with --file")
        known = options.file in Sources(options.file.parent).ledgers
        accept_loss(options.file, options.reason, known)
        print(f"{options.file}: what still verifies is kept; every card now states the loss")
        return
    folder = options.folder or Path(default_ledger())
    if options.action == "restore":
        if options.copy is None and DurableCopy.of(folder) is None:
            raise ConfigError(f"'{folder}' names no durable copy: name it with --copy")
        address = load({}, {"runtime.ledger_copy": options.copy}).runtime.ledger_copy
        keep_copy(folder, address, anew=True)
    files = known_ledgers(folder)
    if not files:
        raise ConfigError(f"'{folder}' holds no ledger: name its folder with --folder")
    problems: list[str] = []
    for path in files:
        try:
            ledger = Ledger.at(path)
            if options.action != "show":
                ledger.verify()  # How many lines would tell of a selection's trials.
                print(f"data set {ledger.name} in '{folder}': unbroken")
            else:
                print(ledger_text(ledger.summary()))
        except LedgerError as error:  # The others are told nevertheless.
            problems.append(str(error))
    for path in Sources(folder).shared_paths():
        print(
            f"warning: '{path}' was read as several data sets with a ledger each, whose epsilons "
            "do not add up: if they hold the same records, give all of them one dataset.family"
        )
    if problems:
        raise LedgerError("; ".join(problems))


def release(options: argparse.Namespace) -> None:
    """Writes or verifies the bundle to publish, or shows what to see before signing it."""
    if options.check:
        _check(_named_run(options))
        return
    if options.out is None:
        raise ConfigError("name the folder of the bundle with --out")
    if options.verify:
        print(f"{options.out}: {verify_release(options.out)} files as released")
        return
    run_dir = _named_run(options)
    config = finished_config(run_dir)
    card = release_card(config, run_dir)
    formats = options.formats.split(",")
    write_release(run_dir, options.out, config, card, formats, options.license)
    print(card["statement"])
    print(f"bundle: {options.out} ({', '.join(formats)}, README.md, privacy_card.md, digests.json)")
    if options.license == "unknown":
        print("README.md states no license: name one with --license, such as cc-by-4.0")


def _named_run(options: argparse.Namespace) -> Path:
    if options.run_dir is None:
        raise ConfigError("name the finished run to release with --run-dir")
    return options.run_dir


def _check(run_dir: Path) -> None:
    config = finished_config(run_dir)
    text, against = review(config, RunFolder(run_dir))
    print(f"For the owner of the data alone.\n\n{text}")
    if against:
        raise ConfigError(f"{len(against)} of these speak against signing: read them above")


def _finished(
    run_dir: Path, overrides: Mapping[str, Any], ema_length: float | None = None
) -> tuple[Config, torch.nn.Module]:
    config, denoiser = load_run(run_dir, overrides)
    if ema_length is not None:
        snapshots = RunFolder(run_dir).snapshots
        reconstruct(denoiser, snapshots, config.training.num_steps, ema_length)
    return config, denoiser


def _read(config: Config) -> Dataset:
    console = Console(config.training.num_steps)
    return load_dataset(config.dataset, Path(config.runtime.cache), console)


def generate(options: argparse.Namespace) -> None:
    """Draws more images from a finished run or from the generator of a bundle."""
    overrides = parse_overrides(options.overrides)
    if options.bundle is not None:
        if options.ema_length is not None:
            raise ConfigError("--ema-length needs a run's snapshots: name it with --run-dir")
        generator = Generator.load(options.bundle, overrides)
    else:
        config, denoiser = _finished(options.run_dir, overrides, options.ema_length)
        generator = Generator(denoiser, config)
    images = generator.draw(options.num_images)
    images.write(options.out)
    write_grid(options.out.with_suffix(".png"), images.images, images.labels)
    print(f"{options.num_images} images: {options.out}, {options.out.with_suffix('.png')}")


def inspect(options: argparse.Namespace) -> None:
    """Writes what the owner of the data alone may see of a finished run."""
    if options.max_images < 4:
        raise ConfigError(f"--max-images={options.max_images} must be at least 4")
    config, denoiser = load_run(options.run_dir, parse_overrides(options.overrides))
    if config.method == "dp_merf":
        raise ConfigError(
            "method='dp_merf' trains no denoiser, whose losses the membership attack needs: "
            "inspect a run of another method"
        )
    folder = RunFolder(options.run_dir)
    if (result := folder.result()) is None:
        raise ConfigError(f"'{folder.path}' holds no result: finish the run first")
    dataset = _read(config)
    require_same_data(result.fingerprint, dataset.fingerprint, config)
    page, figures = inspect_run(
        folder, config, denoiser, dataset, options.max_images, config_device(config)
    )
    found = figures["membership"]
    low, high = found["auc_interval"]
    print(f"membership attack: area {found['auc']:.4f} (95 % interval {low:.4f} to {high:.4f})")
    print(f"NON-PRIVATE, for the owner of the data alone: {page}")


def evaluate(options: argparse.Namespace) -> None:
    """Scores a finished run's images again, or those of its average of another length."""
    config, denoiser = _finished(
        options.run_dir, parse_overrides(options.overrides), options.ema_length
    )
    dataset = _read(config)
    if options.ema_length is None:
        synthetic = Split.read(RunFolder(options.run_dir).images)
    else:
        number = config.evaluation.num_images
        synthetic = draw_images(denoiser, config, number, config_device(config))
    scores = score(config, synthetic, dataset, config_device(config), MasterSecret.load())
    tag = "public" if config.dataset.public else "non-private"
    print("  ".join(f"{name} {value:.4g}" for name, value in scores.values.items()) + f"  ({tag})")
    print(to_json(scores.record, indent=2))
