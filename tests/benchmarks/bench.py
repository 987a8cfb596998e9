"""What DP-SGD, FID, sampling and an empty trial cost on a CPU: `make bench`, in about ten minutes.

CPU seconds of one thread, in one process, the variants taking turns; writes `runs/bench.json`
(flat keys) and prints a Markdown table, or puts it between the markers in README.md beside it.

Keys of two shapes B x K, such as `dp_over_sgd_8x16`, are also given as the worse of both.
`grad_memory_ratio` is what our per-example gradients hold over what Opacus's hold.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import variants
from empty_trial import empty_trial_cpu
from pytorch_fid.fid_score import calculate_frechet_distance
from threadpoolctl import threadpool_limits

from core.config import EvaluationConfig, load
from core.data import load_dataset
from core.diffusion.denoiser import build_denoiser
from core.evaluation.fid import Moments, frechet_distance
from core.evaluation.metrics import distribution_metrics
from core.generation.draw import generate
from core.pipeline.run import run
from core.privacy.keys import MasterSecret

SHAPES = ((8, 16), (16, 8))
FEATURES = (64, 192, 2048)
SAMPLER_STEPS = (6, 12, 18, 32)
START, END = "<!-- bench: start -->", "<!-- bench: end -->"
Figures = dict[str, Any]


def engine(repeats: int) -> Figures:
    """A private step against a plain one and against Opacus's."""
    figures: Figures = {}
    for number, (examples, copies) in enumerate(SHAPES):
        config = variants.preset()
        batch = variants.make_batch(config, examples, copies)
        ours, opacus = variants.ours(config, copies), variants.opacus(config, copies)
        steps = {"sgd": variants.sgd(config), "dp": ours, "opacus": opacus}
        seconds, held = variants.interleaved(steps, batch, repeats)
        shape = f"{examples}x{copies}"
        figures |= {f"{name}_seconds_{shape}": value for name, value in seconds.items()}
        figures[f"dp_over_sgd_{shape}"] = seconds["dp"] / seconds["sgd"]
        figures[f"opacus_over_dp_{shape}"] = seconds["opacus"] / seconds["dp"]
        figures[f"grad_memory_ratio_{shape}"] = held["dp"] / held["opacus"]
        if number == 0:
            figures |= other_engines(config, batch, ours, copies)
    for key, worse in (("dp_over_sgd", max), ("opacus_over_dp", min), ("grad_memory_ratio", max)):
        figures[key] = worse(figures[f"{key}_{b}x{k}"] for b, k in SHAPES)
    return figures


def other_engines(config: Any, batch: Any, ours: Any, copies: int) -> Figures:
    """Opacus's other engines, once as they are slow; null with the reason if one fails."""
    figures: Figures = {}
    makers = {
        "functorch": lambda: variants.opacus(config, copies, functorch=True),
        "ghost": lambda: variants.opacus_ghost(config),
    }
    steps = {"dp": ours}
    for name, make in makers.items():
        key = f"opacus_{name}_over_dp"
        figures[key] = figures[f"{key}_reason"] = None
        try:
            step = make()
            step(batch)
        except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
            figures[f"{key}_reason"] = f"{type(error).__name__}: {error}"
        else:
            steps[name] = step
    seconds = variants.taking_turns(steps, batch, 1)
    for name in steps.keys() - {"dp"}:
        figures[f"opacus_{name}_over_dp"] = seconds[name] / seconds["dp"]
    return figures


def switches() -> Figures:
    """What bfloat16 and channels-last do to the private step; below 1 is a gain."""
    plain = variants.preset(runtime__channels_last=False)
    steps = {
        "contiguous": variants.ours(plain, 16),
        "channels_last": variants.ours(variants.preset(), 16),
        "bfloat16": variants.ours(variants.preset(training__precision="bfloat16"), 16),
    }
    seconds, _ = variants.interleaved(steps, variants.make_batch(plain, 8, 16), 2)
    last = seconds["channels_last"]
    return {
        "channels_last_over_contiguous": last / seconds["contiguous"],
        "bfloat16_over_float32": seconds["bfloat16"] / last,
    }


def fid() -> Figures:
    """The Frechet distance from moments against pytorch-fid's, which takes scipy's sqrtm."""
    figures: Figures = {}
    for dimension in FEATURES:
        generator = torch.Generator().manual_seed(dimension)
        mixing = torch.randn(2, dimension, dimension, dtype=torch.float64, generator=generator)
        moments = []
        for mix in mixing / dimension**0.5:
            noise = torch.randn(2 * dimension, dimension, dtype=torch.float64, generator=generator)
            moments.append(Moments(dimension))
            moments[-1].update(noise @ mix + mix[0])
        moments[1] = Moments.restored(moments[1].state_dict())  # The real side, as each run has it.
        numbers = [part.numpy() for m in moments for part in (m.mean, m.covariance)]
        found, taken = list[float](), list[float]()
        for _ in range(1 if dimension > 1000 else 60):  # In turns, as the machine's pace drifts.
            theirs, theirs_seconds = timed(calculate_frechet_distance, numbers)
            ours, ours_seconds = timed(frechet_distance, moments)
            found.append(abs(ours / float(theirs) - 1))
            taken.append(theirs_seconds / ours_seconds)
        figures[f"fid_relative_error_{dimension}"] = max(found)
        figures[f"fid_speedup_{dimension}"] = statistics.median(taken)
    return figures | {"fid_speedup": figures["fid_speedup_2048"]}


def timed(call: Callable[..., Any], arguments: list[Any]) -> tuple[Any, float]:
    """What a call returns, and its CPU seconds."""
    began = time.process_time()
    return call(*arguments), time.process_time() - began


def sampling() -> Figures:
    """Steps of the sampler against `fid_cnn` and time, for a small model of digits."""
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        base = variants.preset(
            "core/configs/digits.yaml",
            training__num_steps=200, private_training__noise_multiplicity=1,
            evaluation__num_images=100, evaluation__classifier_epochs=1,
            runtime__cache=f"{folder}/cache", runtime__ledger=f"{folder}/ledger",
        )  # fmt: skip
        run(base, run_dir, master=MasterSecret(b"s" * 32), name="bench", report=lambda _: None)
        denoiser = build_denoiser(base)
        denoiser.load_state_dict(torch.load(run_dir / "model.pt", weights_only=True))
        dataset, scores = load_dataset(base.dataset), EvaluationConfig(fid_extractor="cnn")
        for steps in SAMPLER_STEPS:
            config = load(run_dir / "config.yaml", {"sampler.num_steps": steps})
            began = time.process_time()
            synthetic = generate(denoiser, config, 1000, "cpu")
            figures[f"sampling_{steps}_seconds"] = time.process_time() - began
            found, _ = distribution_metrics(
                synthetic, dataset, scores, 10, "cpu", Path(folder) / "cache"
            )
            figures[f"sampling_{steps}_fid_cnn"] = found["fid_cnn"]
        steps = base.sampler.num_steps
        low = load(run_dir / "config.yaml", {"sampler.precision": "bfloat16"})
        began = time.process_time()
        synthetic = generate(denoiser, low, 1000, "cpu")
        seconds = time.process_time() - began
        figures["sampling_bfloat16_over_float32"] = seconds / figures[f"sampling_{steps}_seconds"]
        found, _ = distribution_metrics(
            synthetic, dataset, scores, 10, "cpu", Path(folder) / "cache"
        )
        figures["sampling_bfloat16_fid_cnn"] = found["fid_cnn"]
        single = load(run_dir / "config.yaml", {"evaluation.batch_size": 1})
        began = time.process_time()
        generate(denoiser, single, 20, "cpu")
        alone = (time.process_time() - began) / 20
        figures["sampling_batched_speedup"] = alone / figures[f"sampling_{steps}_seconds"] * 1000
    return figures


def empty_trial() -> Figures:
    """What a trial of two workers costs before it trains."""
    return {"empty_trial_cpu_s": empty_trial_cpu()}


def table(figures: Figures) -> str:
    """The figures that a reader compares, as Markdown."""

    def times(key: str) -> str:
        value = figures[key]
        return f"not run ({figures[f'{key}_reason']})" if value is None else f"{value:.2f}"

    rows = [("CPU time of one step, 28x28 network, B x K =", "8 x 16", "16 x 8")]
    for text, key in (
        ("private over plain", "dp_over_sgd"),
        ("Opacus (hooks) over private", "opacus_over_dp"),
        ("memory of per-example gradients over Opacus's", "grad_memory_ratio"),
    ):
        rows.append((text, *(f"{figures[f'{key}_{b}x{k}']:.3g}" for b, k in SHAPES)))
    rows += [
        ("Opacus (functorch) over private", times("opacus_functorch_over_dp"), ""),
        ("Opacus (ghost, clips copies) over private", times("opacus_ghost_over_dp"), ""),
        ("channels-last over contiguous", times("channels_last_over_contiguous"), ""),
        ("bfloat16 over float32", times("bfloat16_over_float32"), ""),
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "| --- | --- | --- |")
    lines += ["", "| Heun steps, 8x8 digits | fid_cnn | CPU seconds for 1,000 images |"]
    lines.append("| --- | --- | --- |")
    for steps in SAMPLER_STEPS:
        score, seconds = (figures[f"sampling_{steps}_{key}"] for key in ("fid_cnn", "seconds"))
        lines.append(f"| {steps} | {score:.3g} | {seconds:.2g} |")
    batched = f"{figures['sampling_batched_speedup']:.1f}"
    distance = ", ".join(f"{figures[f'fid_speedup_{d}']:.1f}" for d in FEATURES)
    error = max(value for key, value in figures.items() if key.startswith("fid_relative_error"))
    lines += [
        "",
        f"Sampling in batches is {batched} times as fast as image by image; in bfloat16 it takes "
        f"{figures['sampling_bfloat16_over_float32']:.2f} of the time on this CPU (fid_cnn "
        f"{figures['sampling_bfloat16_fid_cnn']:.3g} with 18 steps). The Frechet distance "
        f"of {', '.join(f'{d:,}' for d in FEATURES)} features is {distance} times as fast as "
        f"pytorch-fid's, equal to {error:.0e}. "
        f"A trial of a sweep costs {figures['empty_trial_cpu_s']:.0f} CPU seconds before it trains "
        "(two workers: processes and imports).",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="rewrite the tables in README.md")
    parser.add_argument("--repeats", type=int, default=5)
    parts = {
        "fid": fid,
        "sampling": sampling,
        "engine": lambda: engine(options.repeats),
        "switches": switches,
        "empty_trial": empty_trial,
    }
    parser.add_argument(
        "--only", nargs="+", choices=parts, help="measured again; the rest stays as it was"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    began = time.monotonic()
    path = variants.ROOT / "runs" / "bench.json"
    if options.only and not path.exists():
        parser.error(f"--only needs the rest of an earlier run in {path}")
    figures: Figures = json.loads(path.read_text()) if options.only else {}
    with threadpool_limits(1):
        for name in options.only or parts:
            figures |= parts[name]()
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if not options.only:
        figures["seconds"] = time.monotonic() - began
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")
    text = table(figures)
    print(text)
    if options.readme:
        readme = Path(__file__).with_name("README.md")
        before, rest = readme.read_text().split(START)
        readme.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
