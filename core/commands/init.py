"""`python -m core init`: from a folder of images to a configuration and the plan of a sweep."""

import argparse
import math
import os
import re
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core.commands.probe import measure
from core.commands.proposal import NUM_TRIALS, Proposal, propose
from core.commands.survey import Survey, survey
from core.config import Config, DatasetConfig, load, nested, parse_overrides
from core.config.keys import known_keys, nearest_key
from core.device import config_device
from core.errors import ConfigError
from core.generation.png import write_grid
from core.io.files import private_folder, write_whole
from core.io.terminal import Console, counted
from core.privacy.accounting.rounding import upward
from core.privacy.plan.plan import PrivacyPlan, composed_epsilon, make_plan
from core.record.folder import RunFolder

_PUBLIC = ("dataset.num_examples", "dataset.num_classes")
_STATED = {"dataset.path": "the folder", "privacy.target_epsilon": "--epsilon"}
"""Keys that another argument gives."""
_MINUTES = 10.0
_SIDE = 32
_SHOWN = 20


def init(options: argparse.Namespace) -> None:
    """Writes a run's and a sweep's configuration for a folder, and prints the plan."""
    overrides, folder = parse_overrides(options.overrides), options.folder
    out = options.out or Path(f"{name_of(folder, options.epsilon)}.yaml")
    sweep = write_configuration(options, folder, overrides, out)
    print(
        f"train once:   python -m core run --config {out}\n"
        f"or search:    python sweep/run.py --config {sweep}"
    )


def name_of(folder: Path, epsilon: float | None) -> str:
    """Name of a sweep of a folder at an epsilon.

    Raises:
        ConfigError: no epsilon is given, or one that cannot be spent.
    """
    if epsilon is None:
        raise ConfigError("--epsilon is missing: say what a trial may spend, such as --epsilon 10")
    if not 0 < epsilon < math.inf:
        raise ConfigError(
            f"--epsilon={epsilon:g} must be positive and finite: say what a trial may spend, such "
            "as --epsilon 10"
        )
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.absolute().name).strip("-_") or "images"
    return f"{stem[:40]}-epsilon" + str(epsilon).removesuffix(".0")


def write_configuration(
    options: argparse.Namespace, folder: Path, overrides: Mapping[str, Any], out: Path
) -> Path:
    """Shows what lies in the folder, and writes the run's file and, beside it, the sweep's.

    Args:
        options: those of `core.__main__.add_folder_options`.
        overrides: keys of the run, which win over what is proposed.
        out: file of the run.

    Returns:
        File of the sweep.

    Raises:
        ConfigError: a file is there already, or the counts may not be published.
        DataError: what lies in the folder cannot be read.
        InfeasibleError: the budget cannot pay.
    """
    sweep = out.with_name(f"{out.stem}_sweep{out.suffix}")
    if there := [path for path in (out, sweep) if path.exists()]:
        raise ConfigError(f"'{there[0]}' is there already: name another file, or remove it")
    name = name_of(folder, options.epsilon)
    keys = known_keys(Config)
    for key in overrides:
        if key not in keys:
            raise ConfigError(f"unknown key '{key}'{nearest_key(keys, key)}")
        if key in _STATED:
            raise ConfigError(f"{key} is what {_STATED[key]} says: leave the key out")
    first = load({}, {"runtime.device": overrides.get("runtime.device", "auto")})
    device = config_device(first)
    minutes = _minutes(options, device)
    known = {key[8:]: value for key, value in overrides.items() if key.startswith("dataset.")}
    found = survey(folder, {k: v for k, v in known.items() if k != "num_examples"}, Console(0))
    side = known.get("image_size", _side(found))
    _show(found, side, RunFolder(Path("runs") / "init" / name))
    facts = _published(found, side, options.publish_counts, known)
    proposal = propose(facts, found.class_names, options.epsilon, device)
    for key, value in overrides.items():
        proposal = proposal.changed(key, value, "as it was typed")
    proposal = _timed(proposal, minutes, overrides)
    text = proposal.sweep_text(name, out.name, len(os.sched_getaffinity(0)), device == "cuda")
    for path, content in ((out, proposal.run_text()), (sweep, text)):
        write_whole(path, content)
        print(f"written: {path}")
    return sweep


def require_of(folder: Path, out: Path) -> None:
    """Refuses to go on with the run's file of another folder of the same name.

    Raises:
        ConfigError: names both folders.
    """
    known, asked = Path(load(out).dataset.path or "").resolve(), folder.expanduser().resolve()
    if asked not in (known, *known.parents):  # Its images may lie in the only folder in it.
        raise ConfigError(
            f"'{out}' was written for '{known}', not for '{asked}', whose name gives the same "
            "file: rename one of these folders, or name another storage_path"
        )


def _minutes(options: argparse.Namespace, device: str) -> float:
    """Time of one trial.

    Raises:
        ConfigError: it is not positive, or that of a GPU where there is none.
    """
    hours, asked = options.gpu_hours, _MINUTES if options.minutes is None else options.minutes
    stated = f"--minutes={asked:g}" if hours is None else f"--gpu-hours={hours:g}"
    if hours is not None and device != "cuda":
        raise ConfigError(f"{stated}, but there is no GPU here: give --minutes of one trial")
    minutes = asked if hours is None else 60 * hours / NUM_TRIALS
    if not 0 < minutes < math.inf:
        raise ConfigError(f"{stated} must be positive and finite")
    return minutes


def _side(found: Survey) -> int:
    """32; that of the images, a multiple of 4, where all have the same and it is smaller."""
    if len(found.sizes) > 1:
        return _SIDE
    (size,) = found.sizes
    return max(4, min(_SIDE, min(size) // 4 * 4))


def _show(found: Survey, side: int, folder: RunFolder) -> None:
    """Prints a table of what was found, and writes a picture of samples.

    Privacy: for the owner's eyes alone.
    """
    sizes = [min(size) for size in found.sizes.elements()]
    colour = "grey" if found.config.channels == 1 else "colour"
    print(f"{found.config.path}: {found.config.name}, {colour}")
    if found.source.left_out:
        print(f"not read: {found.source.left_out}")
    print(f"shorter side: {min(sizes)} to {max(sizes)} pixels, median {int(np.median(sizes))}")
    print(f"\n{'class':<24} {'training':>9} {'test':>7}")
    train, test = (
        np.bincount(labels, minlength=len(found.class_names))
        for labels in (found.train, found.test)
    )
    rows = list(zip(found.class_names, train, test, strict=True))
    rows = rows[:_SHOWN] + [("...", "", "")] * (len(rows) > _SHOWN)
    for name, *counts in [*rows, ("all", len(found.train), len(found.test))]:
        print(f"{name:<24} {counts[0]:>9} {counts[1]:>7}")
    picture, path = found.picture(side), folder.non_private / "real_images.png"
    private_folder(path.parent)
    write_grid(path, picture.images, picture.labels, columns=8, private=True)
    print(f"\nfor your eyes alone, as a run sees them at {side}x{side}: {path}")


def _published(
    found: Survey, side: int, may_publish: bool, known: Mapping[str, Any]
) -> DatasetConfig:
    """The facts that become public.

    Raises:
        ConfigError: their owner has not said that they may, or has typed other numbers.
    """
    facts = {**nested(found.config), "image_size": side}
    count, classes, channels = (facts[k] for k in ("num_examples", "num_classes", "channels"))
    print(
        f"public with whatever is released: N={count} training images, {classes} classes and "
        f"their names, {channels} channels at {side}x{side}"
    )
    missing = [key for key in _PUBLIC if key.removeprefix("dataset.") not in known]
    if missing and not may_publish:
        typed = " ".join(f"{key}=NUMBER" for key in missing)
        raise ConfigError(
            f"whether these may become public, their owner must say: give --publish-counts, or "
            f"type {typed}"
        )
    for key, unit in (("num_examples", "training images"), ("num_classes", "classes")):
        if (stated := known.get(key, facts[key])) != facts[key]:
            raise ConfigError(
                f"dataset.{key}={stated}, but '{found.config.path}' holds {facts[key]} {unit}: "
                "privacy figures rest on it, so correct it"
            )
    return DatasetConfig(**facts)


def _easy_stage(plan: PrivacyPlan, config: Config) -> str:
    """What is released before DP-SGD, and spent on it."""
    spent = f"which alone spend epsilon {upward(plan.epsilon_central)}"
    if plan.moments is not None:
        return f"moments of {counted(plan.moments.num_clusters, 'cluster')} a class, {spent}"
    if plan.central is not None:
        images = counted(plan.central.num_releases, "central image")
        return f"{config.warm_up_steps} steps on {images} a class, {spent}"
    return "no central images or moments"


def _timed(proposal: Proposal, minutes: float, overrides: Mapping[str, Any]) -> Proposal:
    """The proposal with its steps; prints the plan."""
    config = proposal.config
    speed = measure(config, 1)
    if "training.num_steps" not in overrides and not config.trains_nothing:
        proposal = proposal.in_time(60 * minutes, speed)
        config = proposal.config
    plan, device = make_plan(config), config_device(config)
    seconds = config.warm_up_steps * speed.warm_up + config.private_steps * speed.private_training
    seconds += config.evaluation.num_images * speed.image
    rest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    together = composed_epsilon([plan] * NUM_TRIALS)
    print(
        f"\nnoise     DP-SGD noise multiplier {plan.noise_multiplier:.4g}, batch "
        f"{config.private_training.expected_batch_size} of {config.dataset.num_examples}, "
        f"{config.private_steps} steps\n"
        f"easy      {_easy_stage(plan, config)}\n"
        f"epsilon   {upward(plan.epsilon)} for one trial, {upward(together)} for {NUM_TRIALS} and "
        f"the choice among them, at delta {upward(plan.delta)}\n"
        f"time      about {seconds / 60:.2g} minutes for a trial on this machine's {device}, "
        "without scoring\n"
        f"memory    about {rest:.1f} GiB for each process"
    )
    reasons = proposal.too_small(plan)
    if seconds > 60 * minutes:
        reasons.append(f"{minutes:g} minutes are less than drawing the images and 10 steps take")
    for reason in reasons:
        print(f"too small {reason}")
    return proposal
