"""Started once for each rank by test_ranks.py: trains a tiny run and saves what it released.

A fourth argument is the step at which all ranks die, having kept every step before it; more are
settings such as `method=feta_pro`.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from core.config import load, parse_overrides
from core.early import GoesOn
from core.pipeline import run
from core.privacy.dp_sgd import DpSgdOptimizer
from core.privacy.keys import KeyedStream, MasterSecret
from core.privacy.plan import DpSgdPlan

TINY = {
    "training.num_steps": 6,
    "central_images.per_class": 2,
    "private_training.expected_batch_size": 40,
    "private_training.max_physical_batch_size": 16,
    "model.base_channels": 8,
    "sampler.num_steps": 3,
    "evaluation.num_images": 40,
    "evaluation.batch_size": 16,
    "evaluation.classifier_epochs": 1,
    "evaluation.extractor_epochs": 1,
    "evaluation.fid_extractor": "cnn",
    "runtime.log_every": 2,
}


def tiny_run(
    run_dir: Path,
    also: Callable[[dict], None] = lambda _: None,
    shared: Path | None = None,
    goes_on: GoesOn = lambda _: True,
    **changes: object,
) -> list[dict]:
    """Runs the tiny configuration and returns its reports, each given to `also` as well."""
    reports: list[dict] = []

    def report(metrics: dict) -> None:
        reports.append(metrics)
        also(metrics)

    config = load(
        {},
        TINY
        | {
            "runtime.ledger": str(run_dir / "ledger"),
            "runtime.cache": str(run_dir / "cache"),
        }
        | changes,
    )
    charged = Path(config.runtime.ledger).parent / "charged"
    if not dist.is_initialized() or dist.get_rank() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "trial_id").write_text("tiny")  # Else no two runs would draw alike.
    master = MasterSecret(b"s" * 32)
    settings = {"name": "tiny", "report": report, "charged": charged, "shared": shared}
    run(config, run_dir, master=master, **settings, goes_on=goes_on)
    return reports


def released_noise() -> torch.Tensor:
    """What one step with no examples releases on this rank."""
    parameter = torch.nn.Parameter(torch.zeros(200_000))
    plan = DpSgdPlan(1, 0.1, noise_multiplier=2.0, max_grad_norm=0.5, expected_batch_size=1)
    optimizer = DpSgdOptimizer(torch.optim.SGD([parameter], 1.0), plan, KeyedStream(b"k" * 32))
    optimizer.release(0)
    return -parameter.detach()


if __name__ == "__main__":
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )

    def die(report: dict) -> None:
        if len(sys.argv) > 4 and report["step"] == int(sys.argv[4]):
            os._exit(0)

    every_step = {"runtime.checkpoint_every": 1, "runtime.log_every": 1}
    settings = every_step | parse_overrides(sys.argv[5:]) if len(sys.argv) > 4 else {}
    reports = tiny_run(folder / "run", die, **settings)
    torch.save({"noise": released_noise(), "reports": reports}, folder / f"rank_{rank}.pt")
    dist.destroy_process_group()
