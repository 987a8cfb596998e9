"""The command `audit`: canaries against the code and the plan of a run."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from core.config import Config
from core.data import Split
from core.device import config_device
from core.errors import ConfigError
from core.evaluation.audit import CONFIDENCE, canary_images, canary_scores, closeness, coins
from core.evaluation.audit import audit as one_run_audit
from core.io.terminal import Console
from core.pipeline.run import rehearse
from core.privacy.keys import KeyedStream
from core.privacy.plan.plan import PrivacyPlan
from core.publish.proven import audit_failures, audit_lines, keep, require_same_code
from core.record.folder import RunFolder


def audit(options: argparse.Namespace) -> None:
    """Proves by canaries that what a run's plan releases spends at least so much; opens no data."""
    for key in ("canaries", "black_box"):
        if (count := getattr(options, key)) is not None and count < 100:
            raise ConfigError(f"--{key.replace('_', '-')}={count} must be at least 100")
    folder = RunFolder(options.run_dir)
    config, plan = folder.config(), folder.plan()
    if not plan.is_private:
        raise ConfigError(f"'{folder.path}' claims no epsilon to audit: name a private run")
    if not plan.dp_sgd.num_steps and options.black_box is None:
        raise ConfigError(
            f"'{folder.path}' has no noisy updates of DP-SGD to audit: add --black-box COUNT"
        )
    require_same_code(folder)
    found: dict[str, Any] = {}
    if plan.dp_sgd.num_steps:
        masks, noise = (KeyedStream(os.urandom(32)) for _ in range(2))
        device = config_device(config)
        scores = canary_scores(plan.dp_sgd, options.canaries, masks, noise, device)
        bound = one_run_audit(*scores, plan.delta)
        # Whatever noise the plan holds: what it states is what is claimed.
        found["white_box"] = {**bound, "epsilon": min(plan.epsilon, plan.epsilon_dp_sgd)}
    if options.black_box is not None:
        with tempfile.TemporaryDirectory(dir=folder.path, prefix="audit-") as place:
            found["black_box"] = black_box(config, plan, options.black_box, Path(place))
    keep(folder, found)
    print("\n".join(audit_lines(folder)))
    if failures := audit_failures(folder):
        raise ConfigError(
            f"{'; '.join(failures)}: with confidence {CONFIDENCE:g}, the run does not do what its "
            "plan says"
        )


def black_box(config: Config, plan: PrivacyPlan, count: int, place: Path) -> dict[str, Any]:
    """Trains on canary images, each with probability 1/2, and guesses from synthetic images which.

    Args:
        count: of the canaries.
        place: folder for the training.

    Privacy: opens no data.
    """
    canaries = canary_images(config.dataset, count, int.from_bytes(os.urandom(7), "big"))
    included = coins(KeyedStream(os.urandom(32)), count)
    present = Split(canaries.images[included], canaries.labels[included])
    console = Console(config.training.num_steps)
    synthetic = rehearse(config, plan, present, place, console)
    scores = closeness(canaries, synthetic, config.evaluation.batch_size)
    bound = one_run_audit(scores, included.numpy(), plan.delta)
    return {**bound, "epsilon": plan.epsilon}
