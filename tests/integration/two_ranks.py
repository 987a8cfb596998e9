"""A tiny run, in this process, in one of its own, or as one rank of several."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from core import distributed
from core.config import load
from core.pipeline.context import SweepLink
from core.pipeline.run import run
from core.privacy.keys import KeyedStream, MasterSecret
from core.privacy.mechanisms.dp_sgd import DpSgdOptimizer
from core.privacy.plan.plan import DpSgdPlan

TINY = {
    "privacy.target_epsilon": 1.0,  # Ten takes thrice as long to solve.
    "training.num_steps": 6,
    "central_images.per_class": 2,
    "private_training.expected_batch_size": 40,
    "private_training.max_physical_batch_size": 16,
    "model.base_channels": 8,
    "model.channel_multipliers": [1],
    "sampler.num_steps": 3,
    "evaluation.num_images": 40,
    "evaluation.batch_size": 16,
    "evaluation.classifier_epochs": 1,
    "evaluation.extractor_epochs": 1,
    "evaluation.fid_extractor": "cnn",
    "runtime.log_every": 2,
    "runtime.num_pictures": 1,
}


class StopRunError(Exception):
    """Stands for whatever ends a run in its training."""


def stop_at(step: int) -> Callable[[dict], None]:
    """For `tiny_run`: ends it with the report of a step."""

    def stop(report: dict) -> None:
        if report["step"] == step:
            raise StopRunError

    return stop


def tiny_run(
    run_dir: Path,
    also: Callable[[dict], None] = lambda _: None,
    shared: Path | None = None,
    should_continue: Callable[[float], bool] = lambda _: True,
    **changes: object,
) -> list[dict]:
    """Runs the tiny configuration and returns its reports, each given to `also` as well.

    What is computed from the real images alone is kept for all runs of the tests.
    """
    reports: list[dict] = []

    def report(metrics: dict) -> None:
        if metrics["stage"] not in ("hashing", "decoding"):  # Of a cache that may be there.
            reports.append(metrics)
        also(metrics)

    config = load(
        {},
        TINY
        | {
            "runtime.ledger": str(run_dir / "ledger"),
            "runtime.cache": os.environ["FETA_SWEEP_TEST_CACHE"],
        }
        | changes,
    )
    charged = Path(config.runtime.ledger).parent / "charged"
    if not dist.is_initialized() or dist.get_rank() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "trial_id").write_text("tiny")  # Else no two runs would draw alike.
    master = MasterSecret(b"s" * 32)
    link = SweepLink(charged=charged, shared=shared, should_continue=should_continue)
    run(config, run_dir, master=master, name="tiny", report=report, link=link)
    return reports


def released_noise() -> torch.Tensor:
    """What one step with no examples releases on this rank."""
    parameter = torch.nn.Parameter(torch.zeros(200_000))
    plan = DpSgdPlan(1, 0.1, noise_multiplier=2.0, max_grad_norm=0.5, expected_batch_size=1)
    optimizer = DpSgdOptimizer(torch.optim.SGD([parameter], 1.0), plan, KeyedStream(b"k" * 32))
    optimizer.release(0)
    return -parameter.detach()


# Processes begin as copies of one that has all loaded: an import takes longer than a tiny run.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["core.pipeline.run", "torch._dynamo"])  # Which optimizers load.
_PATIENCE_S = 120
"""Seconds in which each process must end."""


def in_processes(function: Callable[..., None], *calls: tuple[object, ...]) -> list[int | None]:
    """Calls a function of a module in one process for each tuple of arguments.

    Returns:
        The exit codes; None where a process did not end within `_PATIENCE_S` and was killed.
    """
    processes = [_PROCESSES.Process(target=function, args=arguments) for arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_PATIENCE_S)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def start_ranks(folder: Path, world_size: int, last_step: int = 0, **changes: object) -> None:
    """Trains on several ranks; `rank_<number>.pt` holds what each reported and released.

    Args:
        last_step: if positive, step at which all ranks die, having kept every step before it.
    """
    calls = [(rank, world_size, folder, last_step, changes) for rank in range(world_size)]
    codes = in_processes(_rank, *calls)
    assert codes == [0] * world_size, f"exit codes of the ranks; None: not within {_PATIENCE_S} s"


def _rank(
    rank: int, world_size: int, folder: Path, last_step: int, changes: dict[str, object]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )

    def die(report: dict) -> None:
        if last_step and report["step"] == last_step:
            os._exit(0)

    settings: dict[str, object] = {"runtime.cache": str(folder / "cache")}  # To compute it, too.
    if last_step:
        settings |= {"runtime.checkpoint_every": 1, "runtime.log_every": 1}
    reports = tiny_run(folder / "run", die, **settings, **changes)
    torch.save({"noise": released_noise(), "reports": reports}, folder / f"rank_{rank}.pt")
    distributed.leave()
