"""What each choice is worth, one at a time: `make ablations DATA=folder-with-the-four-idx-files`.

Runs the small Fashion-MNIST preset, shortened so that one core trains and scores it in minutes,
as it is and with single settings changed, all at the same epsilon and with the same public seed.
A finished row stays in `runs/ablations.json` and is not run again; a stopped run goes on from its
checkpoint. Prints the rows as a Markdown table.

Masks and privacy noise are fresh in each run, whatever the seed: give two seeds or more, and take
no difference for real that is smaller than the spread of the base.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rows import ROOT, Row, Rows, digest_of

from core.commands.scale_down import scaled_down
from core.config import Config, load, nested
from core.data import load_dataset
from core.diffusion.posthoc_ema import reconstruct
from core.evaluation.scoring import score
from core.generation.draw import generate
from core.generation.generator import load_denoiser
from core.pipeline.single import run
from core.privacy.accounting import renyi, solve
from core.privacy.accounting.mechanism import FINE
from core.privacy.keys import MasterSecret
from core.privacy.plan.plan import PrivacyPlan, make_plan

PRESET = ROOT / "core/configs/fashion_mnist_small.yaml"
BASE = "base"
SHORT = {
    "training.num_steps": 240,
    "evaluation.num_images": 2000,
    "runtime.num_pictures": 0,
    "runtime.checkpoint_every": 40,
    "training.posthoc_ema": True,  # Changes no row, and gives those of `AVERAGES` for nothing.
}
SMOKE = {
    "training.num_steps": 8,
    "private_training.expected_batch_size": 64,
    "evaluation.num_images": 40,
    "evaluation.classifier_epochs": 1,
    "evaluation.extractor_epochs": 1,
}
Changes = dict[str, Any]
"""Settings by dotted key."""
CLIPPED = {"central_images.max_norm": 7.0, "central_images.pixel_center": 0.25}
VARIANTS: dict[str, Changes] = {
    BASE: {},
    "plain DP-SGD (DPDM)": {"stage_split": 0.0},
    "frequency stage (FETA-Pro)": {"method": "feta_pro"},
    "pixel_center 0": {"central_images.pixel_center": 0.0},
    "max_norm 7 around 0.25": CLIPPED,
    "max_norm 7 around 0.25, noise multiplier doubled": {
        **CLIPPED, "central_images.noise_multiplier": 16.0,
    },
    "augmentation none": {"warm_up.augmentation": "none"},
    "noise levels as of v-prediction": {"diffusion.p_mean": -0.69, "diffusion.p_std": 1.57},
    "adam_bc": {"private_training.optimizer": "adam_bc"},
    "adam_bc, a third of the learning rate": {
        "private_training.optimizer": "adam_bc", "private_training.learning_rate": 1e-3,
    },
}  # fmt: skip
AVERAGES = {f"base, EMA length {length}": length for length in (0.05, 0.1, 0.2)}
"""Rows made of the base's run by averaging its weights over another share of the training."""
RDP = "noise as of RDP"
"""The row whose target is what RDP's noise really spends."""
SCALED = "scaled down by 2, as on public data"
"""The row of half the batch and half the noise: what a search sees at half the price."""


def noise_by_rdp(plan: PrivacyPlan) -> float:
    """The DP-SGD noise multiplier that RDP, at integer orders, asks for in place of PLD's."""
    others, (rate, _, steps) = plan.other_mechanisms, plan.dp_sgd.mechanism
    low, high = plan.noise_multiplier / 2, plan.noise_multiplier * 2
    for _ in range(40):
        middle = (low + high) / 2
        spent = renyi.epsilon([*others, (rate, middle, steps)], plan.delta)
        low, high = (middle, high) if spent > plan.target_epsilon else (low, middle)
    return high


def rdp_changes(plan: PrivacyPlan) -> Changes:
    """The target at which PLD's noise is the one that RDP asks for at the plan's own."""
    others, (rate, _, steps) = plan.other_mechanisms, plan.dp_sgd.mechanism
    mechanisms = (*others, (rate, noise_by_rdp(plan), steps))
    epsilon = solve.epsilon_of_mechanisms(mechanisms, plan.delta, plan.neighboring_relation, FINE)
    return {"privacy.target_epsilon": round(epsilon, 4)}


def variants(base: Config) -> Iterator[tuple[str, Config]]:
    """Each row's name and configuration, the base first."""
    for name, changes in VARIANTS.items():
        yield name, load(nested(base), changes)
    yield from ((name, base) for name in AVERAGES)
    yield RDP, load(nested(base), rdp_changes(make_plan(base)))
    yield SCALED, scaled_down(load(nested(base), {"dataset.public": True}), 2)


def run_row(config: Config, folder: Path, length: float | None) -> Row:
    """Trains and scores one row, or goes on with it.

    Args:
        length: of the average of weights that is scored; None: the run's own.
    """
    run_dir = folder / digest_of(config)
    result = run(config, run_dir).report
    if length is not None:
        began = time.monotonic()
        denoiser = load_denoiser(config, run_dir / "model.pt", "cpu")
        reconstruct(denoiser, run_dir / "posthoc_ema", config.training.num_steps, length)
        synthetic = generate(denoiser, config, config.evaluation.num_images, "cpu")
        dataset = load_dataset(config.dataset, Path(config.runtime.cache))
        result |= score(config, synthetic, dataset, "cpu", MasterSecret.load()).values
        result["seconds"] = time.monotonic() - began
    plan = make_plan(config)
    central = plan.central
    return {
        "accuracy": result["accuracy"],
        "fid_cnn": result["fid_cnn"],
        "epsilon": result["epsilon"],
        "noise_multiplier": plan.noise_multiplier,
        "central_stddev": central and central.noise_stddev / central.expected_class_count,
        "seconds": result["seconds"],
    }


def table(rows: list[Row]) -> str:
    """The rows, averaged over the seeds that they and the base share, as Markdown."""
    base = {row["seed"]: row for row in rows if row["name"] == BASE}
    lines = [
        "| change | accuracy | to base | fid_cnn | to base | epsilon | DP-SGD noise multiplier "
        "| central noise per pixel | seeds | seconds |",
        f"|{' --- |' * 10}",
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name and row["seed"] in base]
        if not mine:
            continue

        def mean(key: str, rows: list[Row] = mine) -> float:
            return statistics.fmean(row[key] for row in rows)

        same = [base[row["seed"]] for row in mine]
        accuracy, fid = mean("accuracy"), mean("fid_cnn")
        central = mine[0]["central_stddev"]
        cells = (
            name,
            f"{accuracy:.1%}",
            f"{100 * (accuracy - mean('accuracy', same)):+.1f}",
            f"{fid:.2f}",
            f"{fid - mean('fid_cnn', same):+.2f}",
            f"{mine[0]['epsilon']:.3f}",
            f"{mine[0]['noise_multiplier']:.4f}",
            "-" if central is None else f"{central:.4f}",
            f"{len(mine)}",
            f"{mean('seconds'):.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    if len(base) > 1:
        spread = {
            key: max(r[key] for r in base.values()) - min(r[key] for r in base.values())
            for key in ("accuracy", "fid_cnn")
        }
        lines += [
            "",
            f"Between its seeds the base spreads by {100 * spread['accuracy']:.1f} points of "
            f"accuracy and {spread['fid_cnn']:.2f} of fid_cnn.",
        ]
    return "\n".join(lines)


def accountants(base: Config) -> str:
    """What the accountant alone is worth, in words."""
    plan = make_plan(base)
    by_rdp = noise_by_rdp(plan)
    return (
        f"At epsilon {plan.target_epsilon:g} the base needs a DP-SGD noise multiplier of "
        f"{plan.noise_multiplier:.4f} by PLD and of {by_rdp:.4f} by RDP "
        f"({by_rdp / plan.noise_multiplier - 1:+.1%})."
    )


def main() -> None:
    """Runs what is missing, and prints all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with Fashion-MNIST's IDX files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", help="names of rows; all if not given")
    parser.add_argument("--epsilon", type=float, default=10.0, help="of all rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ablations.json")
    parser.add_argument("--smoke", action="store_true", help="meaningless sizes, seconds a row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.out.with_suffix("")
    settings = {
        **SHORT,
        **(SMOKE if options.smoke else {}),
        "privacy.target_epsilon": options.epsilon,
        "dataset.path": options.data,
        "runtime.cache": str(folder / "cache"),
        "runtime.ledger": str(folder / "ledger"),
    }
    names = (*VARIANTS, *AVERAGES, RDP, SCALED)
    if unknown := set(options.rows or ()) - set(names):
        sys.exit(f"no such row: {sorted(unknown)}; there are {names}")
    kept = Rows(options.out)
    shown: list[Row] = []
    for seed in options.seeds:
        base = load(PRESET, {**settings, "seed": seed})
        for name, config in variants(base):
            asked = {"name": name, "seed": seed, "digest": digest_of(config)}
            row = kept.find(asked)
            if row is None and name in {BASE, *(options.rows or names)}:
                print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
                row = asked | run_row(config, folder, AVERAGES.get(name))
                kept.add(row)
            shown += [row] if row else []
    print(f"{table(shown)}\n\n{accountants(load(PRESET, settings))}")


if __name__ == "__main__":
    main()
