"""A trial that trains nothing and leaves what a real one leaves, for tests of all around it."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tiny_sweep import ROOT

from core.config import Config, nested, yaml_subset
from core.io.files import write_json
from core.privacy.ledger.account import Spending
from core.privacy.plan.plan import PrivacyPlan, make_plan

DRIVE = """
import functools, sys
from stand_in import stand_in
from sweep.driver import launch
launch.run_sweep = functools.partial(launch.run_sweep, train=stand_in)
from sweep.run import main
sys.exit(main(sys.argv[1:]))
"""


def drive(
    folder: Path, sweep: str, joined: dict[str, str], *arguments: str, code: int = 0
) -> tuple[str, str]:
    """Runs the command line of a sweep whose trials are stand-ins; returns what it printed."""
    (folder / "sweep.yaml").write_text(sweep)
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    environment |= {"PYTHONPATH": path, **joined}
    done = subprocess.run(
        [sys.executable, "-c", DRIVE, "--config", str(folder / "sweep.yaml"), *arguments],
        cwd=folder,
        env=environment | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == code, done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout, done.stderr


def stand_in(context: Any, config: Config, trial_id: str) -> Iterator[dict[str, Any]]:
    """What a trial leaves and reports, without workers and training.

    Both scores rise with the learning rate: none of two trials beats the other in both. One early
    score is told and decided upon, if the sweep has a scheduler.
    """
    import psutil
    import ray

    from sweep.trials.keeper import KeptAccount, asking

    run_dir, plan = context.run_dir(trial_id), make_plan(config)
    folder = Path(config.runtime.ledger)
    charged = context.sweep.folder / "charged"
    own = Spending(config, plan, folder, context.sweep.name, run_dir, charged, context.launch)
    account = KeptAccount(own, asking(context.keeper)) if context.keeper else own
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml_subset.dump(nested(config)))
    write_json(run_dir / "privacy.json", plan.summary())
    data = json.dumps([config.dataset.name, config.dataset.path])
    fingerprint = hashlib.sha256(data.encode()).hexdigest()
    reservation = account.reserve(fingerprint, trial_id)

    def logged(report: dict[str, Any]) -> dict[str, Any]:
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(report) + "\n")
        return report

    for step in (2, 4):
        account.count(step - 1)
        report = {"step": step, "stage": "private_training", "loss": 1.0, "seconds_per_step": 0.1}
        yield logged(report)
        if (share := config.early_steps.get(step)) is not None:
            score = {"early_accuracy": min(1.0, config.private_training.learning_rate)}
            kept = {"identity": trial_id, "scores": {str(share): score["early_accuracy"]}}
            write_json(run_dir / "early_scores.json", kept)
            yield logged({"step": step, "stage": "early_score", "progress": share, **score})
            if not ray.get(context.verdicts.ask.remote(trial_id, share)):
                account.commit(fingerprint, reservation)
                spent = {"epsilon": plan.epsilon_after(step), "seconds": 0.1}
                spent["noise_multiplier"] = plan.noise_multiplier
                result = {"step": step, "stage": "stopped", **score, **spent}
                origin = _origin(trial_id, fingerprint, plan, score)
                write_json(run_dir / "stopped.json", {**result, **origin})
                yield result
                return
    account.commit(fingerprint, reservation)
    rate = config.private_training.learning_rate
    scores = {"accuracy": min(1.0, rate), "fid_cnn": 10 + 100 * rate}
    spent = {"epsilon": plan.epsilon, "noise_multiplier": plan.noise_multiplier}
    result = {"step": 4, "stage": "done", **scores, **spent, "seconds": 0.1}
    origin = _origin(trial_id, fingerprint, plan, scores)
    write_json(run_dir / "evaluation.json", {**result, **origin, "name": context.sweep.name})
    me = psutil.Process()
    used = {"rss": me.memory_info().rss, "cpu": sum(me.cpu_times()[:2])}
    write_json(run_dir / "worker.json", {"pid": os.getpid(), "time": time.time(), **used})
    yield result


def _origin(trial_id: str, fingerprint: str, plan: PrivacyPlan, scores: Iterable[str]) -> dict:
    tags = {metric: plan.tag(metric) for metric in scores}
    return {"identity": trial_id, "fingerprint": fingerprint, "tags": tags}
