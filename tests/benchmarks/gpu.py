"""What the private step does on one GPU; needs torch, numpy, opacus, dp-accounting and pydantic.

    python tests/benchmarks/gpu.py            # minutes; writes runs/gpu.json and prints a table
    python tests/benchmarks/gpu.py --dry-run  # tiny sizes on the CPU: shows that it runs

Wall seconds between synchronisations, median after a warm-up, the variants taking turns.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import variants

from core.config import Config
from core.privacy.mechanisms.convolution_gradients import grouped, one_by_one

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Figures = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    device: str
    preset: str
    examples: int
    copies: int
    largest: int
    matmul: int
    repeats: int


REAL = Sizes("cuda", "core/configs/mnist.yaml", 64, 32, 4096, 8192, 5)
DRY = Sizes("cpu", "core/configs/digits.yaml", 2, 2, 4, 64, 1)


def wall_seconds(steps: dict[str, Callable[[], Any]], sizes: Sizes) -> dict[str, float]:
    """Median wall seconds of each step."""

    def wait() -> None:
        if sizes.device == "cuda":
            torch.cuda.synchronize()

    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(sizes.repeats + 1):
        for name, step in steps.items():
            wait()
            began = time.perf_counter()
            step()
            wait()
            if turn:
                found[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in found.items()}


def matmul_rate(dtype: torch.dtype, sizes: Sizes) -> float:
    """FLOP/s of a square matrix product: what the card reaches at best."""
    side = sizes.matmul
    left, right = (torch.randn(side, side, device=sizes.device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / wall_seconds({"matmul": lambda: left @ right}, sizes)["matmul"]


def engines(config: Config, sizes: Sizes) -> Figures:
    """Seconds of a step of every engine; null where one fails, with the reason."""
    device, copies = sizes.device, sizes.copies
    batch = variants.make_batch(config, sizes.examples, copies, device)
    makers: dict[str, Callable[[], variants.Step]] = {
        "sgd": lambda: variants.sgd(config, device),
        "dp": lambda: variants.ours(config, copies, device),
        "opacus": lambda: variants.opacus(config, copies, device),
        "opacus_functorch": lambda: variants.opacus(config, copies, device, functorch=True),
        "opacus_ghost": lambda: variants.opacus_ghost(config, device),
    }
    steps: dict[str, Callable[[], Any]] = {}
    figures: Figures = {}
    for name, make in makers.items():
        try:
            step = make()
            step(batch)
            steps[name] = lambda step=step: step(batch)
        except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
            figures |= {f"{name}_seconds": None, f"{name}_reason": f"{error}"[:200]}
    seconds = wall_seconds(steps, sizes)
    figures |= {f"{name}_seconds": value for name, value in seconds.items()}
    figures["dp_over_sgd"] = seconds["dp"] / seconds["sgd"]
    with FlopCounterMode(display=False) as counter:
        variants.sgd(config, device)(batch)
    figures["flop_per_sample"] = counter.get_total_flops() / (sizes.examples * copies)
    return figures


def largest_batch(config: Config, sizes: Sizes) -> int:
    """Most images, with K draws each, in one private step; in powers of two."""
    step, fits, examples = variants.ours(config, sizes.copies, sizes.device), 0, 1
    while examples <= sizes.largest:
        try:
            step(variants.make_batch(config, examples, sizes.copies, sizes.device))
        except torch.OutOfMemoryError:
            break
        fits, examples = examples, 2 * examples
    return fits


def weight_gradients(dtype: torch.dtype, sizes: Sizes) -> Figures:
    """Both ways of a 3x3 convolution of 64 channels, which decide `_WORTH_A_CALL`."""
    figures: Figures = {}
    for side in (14, 28):
        layer = nn.Conv2d(64, 64, 3, padding=1, device=sizes.device)
        shape = (sizes.examples * sizes.copies, 64, side, side)
        x, grad = (torch.randn(shape, device=sizes.device, dtype=dtype) for _ in range(2))
        steps = {
            way.__name__: lambda way=way, x=x, grad=grad, layer=layer: way(
                layer, x, grad, sizes.copies
            )
            for way in (one_by_one, grouped)
        }
        seconds = wall_seconds(steps, sizes)
        figures |= {f"conv_{side}_{name}_seconds": value for name, value in seconds.items()}
    return figures


def measure(sizes: Sizes) -> Figures:
    """All figures, each key with the precision at its end."""
    figures: Figures = {}
    for precision, dtype in DTYPES.items():
        config = variants.preset(sizes.preset, training__precision=precision)
        found = engines(config, sizes)
        found["matmul_flop_per_second"] = matmul_rate(dtype, sizes)
        found["samples_per_second"] = sizes.examples * sizes.copies / found["dp_seconds"]
        achieved = found["flop_per_sample"] * found["samples_per_second"]
        found["flop_per_second"] = achieved
        found["share_of_matmul"] = achieved / found["matmul_flop_per_second"]
        private = config.private_training
        samples = config.private_steps * private.expected_batch_size * private.noise_multiplicity
        found["recipe_samples"] = samples
        found["recipe_flop"] = samples * found["flop_per_sample"]
        found["recipe_gpu_hours"] = samples / found["samples_per_second"] / 3600
        found["largest_physical_batch"] = largest_batch(config, sizes)
        found |= weight_gradients(dtype, sizes)
        figures |= {f"{key}_{precision}": value for key, value in found.items()}
    return figures


ROWS = (
    ("private over plain", "dp_over_sgd", 1.0),
    ("plain step, ms", "sgd_seconds", 1e3),
    ("private step, ms", "dp_seconds", 1e3),
    ("Opacus (hooks), ms", "opacus_seconds", 1e3),
    ("Opacus (functorch), ms", "opacus_functorch_seconds", 1e3),
    ("Opacus (ghost, clips copies), ms", "opacus_ghost_seconds", 1e3),
    ("achieved TFLOP/s", "flop_per_second", 1e-12),
    ("matrix product, TFLOP/s", "matmul_flop_per_second", 1e-12),
    ("largest physical batch", "largest_physical_batch", 1.0),
    ("GPU hours of the MNIST recipe at epsilon 10", "recipe_gpu_hours", 1.0),
)


def table(figures: Figures | None) -> str:
    """Markdown; None says "not measured" everywhere."""
    lines = [f"| one GPU | {' | '.join(DTYPES)} |", "| --- | --- | --- |"]
    for text, key, factor in ROWS:
        cells = []
        for precision in DTYPES:
            value = None if figures is None else figures[f"{key}_{precision}"]
            missing = "not measured" if figures is None else "failed"
            cells.append(missing if value is None else f"{value * factor:.3g}")
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    dry = parser.parse_args().dry_run
    warnings.filterwarnings("ignore")
    if not dry and not torch.cuda.is_available():
        print(table(None))
        sys.exit("no GPU: nothing was measured")
    figures = measure(DRY if dry else REAL)
    if not dry:
        figures["device"] = torch.cuda.get_device_name()
        path = variants.ROOT / "runs" / "gpu.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")
    print("a dry run: the figures mean nothing" if dry else f"on {figures['device']}")
    print(table(figures))


if __name__ == "__main__":
    main()
