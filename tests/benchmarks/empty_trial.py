"""CPU seconds that a trial of a sweep costs before it trains: processes, imports, start-up.

Counted from the end of a sweep's first near-empty trial to that of its last, so that what starts
once (Ray, the driver) does not count. All processes are found by a mark in their environment, and
the last CPU time seen of each is added up.
"""

import os
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path

import ray  # noqa: F401  # Before psutil, which comes with it.

import psutil  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
MARK = "FETA_SWEEP_BENCH"
SWEEP = f"""
name: empty
base: {ROOT}/core/configs/digits.yaml
fixed:
  training.num_steps: 2
  runtime.ledger: runs/ledger
  privacy.target_epsilon: 1.0
  private_training.expected_batch_size: 60
  private_training.noise_multiplicity: 1
  model.base_channels: 8
  sampler.num_steps: 2
  evaluation.num_images: 20
  evaluation.classifier_epochs: 1
  evaluation.extractor_epochs: 1
search_space:
  stage_split:
    low: 0.2
    high: 0.8
"""


def empty_trial_cpu(trials: int = 2) -> float:
    """CPU seconds of each trial beyond the first of a sweep, from one trial's end to the next's."""
    with tempfile.TemporaryDirectory() as name:
        folder, mark = Path(name), uuid.uuid4().hex
        (folder / "sweep.yaml").write_text(SWEEP)
        environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
        process = subprocess.Popen(
            [
                *(sys.executable, ROOT / "sweep" / "run.py", "--config", folder / "sweep.yaml"),
                *(f"num_trials={trials}", "max_concurrent_trials=1"),
            ],
            cwd=folder,
            env=environment | {MARK: mark, "FETA_SWEEP_SECRET_FILE": str(folder / "secret")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        watch = _Watch(mark, folder / "runs" / "empty" / "trials")
        code = process.wait()
        at_ends = watch.stop()
    if code != 0 or len(at_ends) != trials:
        raise RuntimeError(f"the sweep of {trials} empty trials ended with {code}: {at_ends}")
    return (at_ends[-1] - at_ends[0]) / (trials - 1)


class _Watch:
    """Adds up the CPU time of all processes that carry a mark, also of those that end."""

    def __init__(self, mark: str, trials: Path) -> None:
        self._trials, self._at_ends = trials, list[float]()
        self._mark = f"{MARK}={mark}".encode()
        self._seconds: dict[tuple[int, float], float] = {}
        self._known: dict[int, psutil.Process | None] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> list[float]:
        """Ends the watch; returns the CPU seconds that were used when each trial had ended."""
        self._stopping.set()
        self._thread.join()
        return self._at_ends

    def _run(self) -> None:
        while not self._stopping.wait(0.25):
            for pid in psutil.pids():
                if pid not in self._known:
                    self._known[pid] = self._marked(pid)
                if (process := self._known[pid]) is not None:
                    self._look(process)
            if len(list(self._trials.glob("*/evaluation.json"))) > len(self._at_ends):
                self._at_ends.append(sum(self._seconds.values()))

    def _marked(self, pid: int) -> psutil.Process | None:
        try:
            marked = self._mark in Path(f"/proc/{pid}/environ").read_bytes()
            return psutil.Process(pid) if marked else None
        except (OSError, psutil.NoSuchProcess):
            return None

    def _look(self, process: psutil.Process) -> None:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            return
        self._seconds[process.pid, process.create_time()] = times.user + times.system


if __name__ == "__main__":
    print(f"{empty_trial_cpu():.1f} CPU seconds an empty trial")
