"""What a run does on one GPU; needs torch, numpy, scipy, opacus and pydantic alone.

    python tests/benchmarks/gpu.py            # minutes; writes runs/gpu.json and prints a table
    python tests/benchmarks/gpu.py --dry-run  # tiny sizes on the CPU: shows that it runs

Wall seconds between synchronisations, median after a warm-up. Each variant is alone in memory. What
fails is a null with its reason in `runs/gpu.json`; the rest is measured all the same.
"""

import argparse
import dataclasses
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import variants

from core.config import Config
from core.data import Split
from core.diffusion.denoiser import build_denoiser
from core.diffusion.ema import Ema
from core.diffusion.loss import draw
from core.evaluation.classifiers import train_classifier
from core.evaluation.kid import kernel_distance
from core.evaluation.networks import FEATURES
from core.evaluation.precision_recall import precision_and_recall
from core.generation.draw import draw_images
from core.privacy.keys import KeyedStream
from core.privacy.mechanisms.convolution_gradients import (
    by_kernel,
    grouped,
    one_by_one,
    shifted,
)
from core.privacy.mechanisms.dp_sgd import DpSgdOptimizer
from core.privacy.mechanisms.kernels import fused_kernels
from core.privacy.mechanisms.per_example_gradients import PerExampleGradients
from core.training import stages
from core.training.physical_batch import PhysicalBatches

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Figures = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        examples: images, with K draws each, of the step in which engines are compared.
        attempted: most images that `auto` is shown at once.
        learned: images of the classifier's measured epoch.
    """

    device: str
    preset: str
    examples: int
    attempted: int
    learned: int
    matmul: int
    repeats: int
    sampler_steps: int
    settings: Figures = field(default_factory=dict)


REAL = Sizes("cuda", "core/configs/mnist.yaml", 16, 1024, 12_800, 8192, 5, 10)
DRY = Sizes(
    *("cpu", "core/configs/digits.yaml", 2, 4, 40, 64, 1, 2),
    settings={
        "model__base_channels": 8,
        "private_training__noise_multiplicity": 2,
        "private_training__max_physical_batch_size": 2,
        "evaluation__num_features": 40,
        "evaluation__batch_size": 4,
    },
)


def wall_seconds(step: Callable[[], Any], sizes: Sizes) -> float:
    """Median wall seconds of a step, after one that allocates memory and chooses kernels."""

    def now() -> float:
        if sizes.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    step()
    found: list[float] = []
    for _ in range(sizes.repeats):
        began = now()
        step()
        found.append(now() - began)
    return statistics.median(found)


@contextmanager
def alone(figures: Figures, name: str) -> Iterator[None]:
    """Notes under `NAME_reason` why what is in the block fails, and frees what it held."""
    try:
        yield
    except Exception as error:
        figures[f"{name}_reason"] = f"{type(error).__name__}: {error}"[:300]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def matmul_rate(dtype: torch.dtype, sizes: Sizes) -> float:
    """FLOP/s of a square matrix product, of float32 in TF32: what the card reaches at best."""
    side, precise = sizes.matmul, torch.get_float32_matmul_precision()
    left, right = (torch.randn(side, side, device=sizes.device).to(dtype) for _ in range(2))
    torch.set_float32_matmul_precision("high")
    try:
        return 2 * side**3 / wall_seconds(lambda: left @ right, sizes)
    finally:
        torch.set_float32_matmul_precision(precise)


def engines(config: Config, sizes: Sizes) -> Figures:
    """Seconds of a step of every engine."""
    device, copies = sizes.device, config.private_training.noise_multiplicity
    batch = variants.make_batch(config, sizes.examples, copies, device)
    makers: dict[str, Callable[[], variants.Step]] = {
        "sgd": lambda: variants.sgd(config, device),
        "dp": lambda: variants.ours(config, copies, device),
        "opacus": lambda: variants.opacus(config, copies, device),
        "opacus_functorch": lambda: variants.opacus(config, copies, device, functorch=True),
        "opacus_ghost": lambda: variants.opacus_ghost(config, device),
    }
    figures: Figures = {}

    def timed(make: Callable[[], variants.Step]) -> float:
        step = make()
        return wall_seconds(lambda: step(batch), sizes)

    for name, make in makers.items():
        with alone(figures, name):
            figures[f"{name}_seconds"] = timed(make)
    if "dp_seconds" in figures and "sgd_seconds" in figures:
        figures["dp_over_sgd"] = figures["dp_seconds"] / figures["sgd_seconds"]
    return figures


def flop_per_sample(config: Config) -> float:
    """Of a plain step on one noisy image; counted on the CPU."""
    step, batch = variants.sgd(config), variants.make_batch(config, 1, 1)
    with FlopCounterMode(display=False) as counter:
        step(batch)
    return counter.get_total_flops()


def private_step(config: Config, sizes: Sizes) -> Figures:
    """Parts of a DP-SGD step, of the size that `auto` chooses, and what ends a step."""
    device, settings, dataset = sizes.device, config.private_training, config.dataset
    denoiser = variants.network(config, device)
    average = Ema(denoiser, config.training.ema_decay)
    copies, fused = settings.noise_multiplicity, fused_kernels(config)
    per_example = PerExampleGradients(denoiser, copies, fused)
    optimizer = DpSgdOptimizer(variants.adam(denoiser), variants.PLAN, KeyedStream(b"k" * 32))
    split = stages.resident(images_of(config, dataset.num_examples), device)
    batches = PhysicalBatches(config, device)

    def accumulate(part: torch.Tensor) -> torch.Tensor:
        loss = stages._loss_of_part(config, per_example, None, split, part, "gpu", 0)
        loss.backward()
        optimizer.accumulate()
        return loss.detach()

    def release() -> None:
        optimizer.release(0)
        average.update(denoiser)

    ids = torch.arange(min(sizes.attempted, settings.expected_batch_size))
    for _ in batches.run(accumulate, ids, per_example.set_grad_sample_to_none):
        pass
    part, shape = ids[: batches.size], split.images.shape[1:]

    def draws() -> None:
        draw("gpu", 0, part, copies, shape, device, fused)

    figures: Figures = {
        "physical_batch": len(part),
        "part_seconds": wall_seconds(lambda: accumulate(part), sizes),
        "draws_seconds": wall_seconds(draws, sizes),
        "upload_seconds": wall_seconds(lambda: stages.chosen_records(split, part, device), sizes),
        "release_seconds": wall_seconds(release, sizes),
    }
    step = settings.expected_batch_size / len(part) * figures["part_seconds"]
    figures["private_step_seconds"] = step + figures["release_seconds"]
    figures["samples_per_second"] = len(part) * copies / figures["part_seconds"]
    figures["private_hours"] = config.private_steps * figures["private_step_seconds"] / 3600
    return figures


def images_of(config: Config, count: int) -> Split:
    """Random images of the data set's shape."""
    dataset, generator = config.dataset, torch.Generator().manual_seed(0)
    shape = (count, dataset.channels, dataset.image_size, dataset.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count) % dataset.num_classes)


def warm_up(config: Config, sizes: Sizes) -> Figures:
    """A step of the easy stage, its augmentation on the CPU included."""
    if not importlib.util.find_spec("torchvision"):  # Without which some cannot be had.
        changed = config.warm_up.model_copy(update={"augmentation": "affine"})
        config = config.model_copy(update={"warm_up": changed})
    count = config.dataset.num_classes * config.central_images.per_class
    split = images_of(config, count)
    data = [stages.WarmUpData(config.warm_up_steps, split.images / 255, split.labels)]
    denoiser = build_denoiser(config).to(sizes.device)
    stage = stages.warm_up_stage(config, denoiser, data)
    seconds = wall_seconds(lambda: stage.step(0), sizes)
    return {
        "augmentation": config.warm_up.augmentation,
        "warm_up_seconds": seconds,
        "warm_up_hours": config.warm_up_steps * seconds / 3600,
    }


def sampling(config: Config, sizes: Sizes) -> Figures:
    """All synthetic images, from a chunk of them at a few steps of the sampler."""
    short = config.sampler.model_copy(update={"num_steps": sizes.sampler_steps})
    count = min(config.evaluation.batch_size, config.evaluation.num_images)
    labels = torch.arange(count) % config.dataset.num_classes
    denoiser = build_denoiser(config).to(sizes.device).eval()
    few = config.model_copy(update={"sampler": short})
    chunk = wall_seconds(lambda: draw_images(denoiser, labels, few, 0, 0, sizes.device), sizes)

    def evaluations(steps: int) -> int:
        return 2 * steps - 1 if config.sampler.name == "heun" else steps

    one = chunk / evaluations(sizes.sampler_steps) / count
    each = one * evaluations(config.sampler.num_steps)
    hours = each * config.evaluation.num_images / 3600
    return {"evaluation_seconds": one, "image_seconds": each, "sampling_hours": hours}


def scores(config: Config, sizes: Sizes) -> Figures:
    """Classifiers and, of the small network, all that `fid_cnn` and its like are made of."""
    device, settings = sizes.device, config.evaluation
    split, few = images_of(config, sizes.learned), images_of(config, 2)

    def learn(network: str) -> float:
        arguments = (config.dataset.num_classes, 1, settings.classifier_batch_size, 0, device)
        step = lambda: train_classifier(split, few, *arguments, network=network)  # noqa: E731
        return wall_seconds(step, dataclasses.replace(sizes, repeats=1)) / sizes.learned

    real, ours = (torch.rand(settings.num_features, FEATURES, device=device) for _ in range(2))

    def compare() -> None:
        precision_and_recall(real, ours)
        kernel_distance(real, ours, torch.Generator().manual_seed(0))

    each = {network: learn(network) for network in {"cnn", *settings.classifiers}}
    seen = settings.num_images * settings.classifier_epochs * settings.num_repeats
    seconds = seen * sum(each[network] for network in settings.classifiers)
    seconds += config.dataset.num_examples * settings.extractor_epochs * each["cnn"]
    seconds += wall_seconds(compare, dataclasses.replace(sizes, repeats=1))
    return {"classifier_image_seconds": each["cnn"], "scores_hours": seconds / 3600}


def weight_gradients(dtype: torch.dtype, copies: int, sizes: Sizes) -> Figures:
    """All ways to the weight gradients of 3x3 convolutions to 64 channels."""
    figures: Figures = {}
    for channels, side in ((64, 14), (128, 14), (64, 28), (128, 28)):
        layer = nn.Conv2d(channels, 64, 3, padding=1, device=sizes.device)
        x, grad = (
            torch.randn(sizes.examples * copies, width, side, side, device=sizes.device)
            .to(dtype)
            .contiguous(memory_format=torch.channels_last)
            for width in (channels, 64)
        )
        for way in (one_by_one, grouped, shifted, by_kernel):
            name = f"conv_{channels}_{side}_{way.__name__}"
            with alone(figures, name):
                call = lambda way=way: way(layer, x, grad, copies)  # noqa: B023, E731
                figures[f"{name}_seconds"] = wall_seconds(call, sizes)
    return figures


def measure(sizes: Sizes) -> Figures:
    """All figures, each key with the precision at its end."""
    figures: Figures = {
        "device": torch.cuda.get_device_name() if sizes.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "tf32_in_convolutions": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    with tempfile.TemporaryDirectory() as cache:  # Nothing that an earlier run found out.
        for precision, dtype in DTYPES.items():
            config = variants.preset(
                sizes.preset,
                **{"runtime__cache": cache, "runtime__device": sizes.device} | sizes.settings,
                training__precision=precision,
                sampler__precision=precision,
            )
            found = measured(config, dtype, sizes)
            figures |= {f"{key}_{precision}": value for key, value in found.items()}
    return figures


def measured(config: Config, dtype: torch.dtype, sizes: Sizes) -> Figures:
    """Figures of one precision."""
    copies = config.private_training.noise_multiplicity
    parts: dict[str, Callable[[], Figures]] = {
        "private_step": lambda: private_step(config, sizes),
        "warm_up": lambda: warm_up(config, sizes),
        "sampling": lambda: sampling(config, sizes),
        "scores": lambda: scores(config, sizes),
        "engines": lambda: engines(config, sizes),
        "matmul": lambda: {"matmul_flop_per_second": matmul_rate(dtype, sizes)},
        "weight_gradients": lambda: weight_gradients(dtype, copies, sizes),
    }
    found: Figures = {"flop_per_sample": flop_per_sample(config)}
    for name, part in parts.items():
        with alone(found, name):
            found |= part()
    if "samples_per_second" in found:
        found["flop_per_second"] = found["flop_per_sample"] * found["samples_per_second"]
        if "matmul_flop_per_second" in found:
            found["share_of_matmul"] = found["flop_per_second"] / found["matmul_flop_per_second"]
    hours = [found.get(f"{part}_hours") for part in ("warm_up", "private", "sampling", "scores")]
    if None not in hours:
        found["hours"] = sum(hours)
    return found


ROWS = (
    ("images that `auto` takes at once, K draws each", "physical_batch", 1.0),
    ("these forward, backward and clipped, ms", "part_seconds", 1e3),
    ("of which draws, ms", "draws_seconds", 1e3),
    ("of which gathering and upload, ms", "upload_seconds", 1e3),
    ("noise, division, Adam, average, ms", "release_seconds", 1e3),
    ("DP-SGD step, s", "private_step_seconds", 1.0),
    ("TFLOP/s of a DP-SGD step", "flop_per_second", 1e-12),
    ("matrix product, TFLOP/s (float32: TF32)", "matmul_flop_per_second", 1e-12),
    ("share of that", "share_of_matmul", 1.0),
    ("private over plain, 16 images", "dp_over_sgd", 1.0),
    ("plain step, ms", "sgd_seconds", 1e3),
    ("private step, ms", "dp_seconds", 1e3),
    ("Opacus (hooks), ms", "opacus_seconds", 1e3),
    ("Opacus (functorch), ms", "opacus_functorch_seconds", 1e3),
    ("Opacus (ghost, clips copies), ms", "opacus_ghost_seconds", 1e3),
    ("warm-up step, ms", "warm_up_seconds", 1e3),
    ("hours of the MNIST recipe: warm-up", "warm_up_hours", 1.0),
    ("DP-SGD", "private_hours", 1.0),
    ("sampling of 60,000 images", "sampling_hours", 1.0),
    ("scores but for Inception's features", "scores_hours", 1.0),
    ("all of these", "hours", 1.0),
)


def table(figures: Figures | None) -> str:
    """Markdown; None says "not measured" everywhere."""
    lines = [f"| one GPU | {' | '.join(DTYPES)} |", "| --- | --- | --- |"]
    for text, key, factor in ROWS:
        cells = []
        for precision in DTYPES:
            value = None if figures is None else figures.get(f"{key}_{precision}")
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
        path = variants.ROOT / "runs" / "gpu.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")
    print("a dry run: the figures mean nothing" if dry else f"on {figures['device']}")
    convolutions = "TF32" if figures["tf32_in_convolutions"] else "float32"
    products = figures["float32_matmul_precision"]
    print(f"float32: convolutions in {convolutions}, products of precision '{products}'")
    print(table(figures))


if __name__ == "__main__":
    main()
