"""The folder of a run: the name and format of every file in it, for who writes and who reads it."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config import Config, flatten, load, load_yaml, nested, yaml_subset
from core.errors import ConfigError, storage_errors
from core.io.files import numbers, read_json, to_json, write_json, write_whole
from core.privacy.plan.plan import PrivacyPlan, make_plan, resumed_plan
from core.record.early import ENDED_EARLY

CONFIG, CLASSES, GRID, IMAGES = "config.yaml", "classes.json", "grid.png", "images.npz"
"""Names that a bundle and a generator share with a run."""
NON_PRIVATE = "non_private"
"""Folder of a run for its owner's eyes: real images and attacks. Neither bundle nor MLflow may
hold it."""
COMPUTED_BY, CODE = "computed by", "code of core"
"""In a run's identity: the group of what computes, and the digest of the code in it."""
STEPS_BEGUN = ".begun"
"""Ending of the files that count the DP-SGD steps that began, from the reservation on."""
_ORIGIN = ("identity", "fingerprint", "name", "tags", "scored")


def identity_of(parts: Mapping[str, Any]) -> str:
    """The digest of all that decides what a run releases."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Result:
    """How a run ended, for good.

    Attributes:
        report: what it reported last: scores, epsilons, noise multiplier and seconds.
        identity: of the run.
        fingerprint: of the data's content.
        name: of the sweep or the single run, in the ledger.
        tags: how private each metric is.
        scored: how its scores were computed; None where it was stopped early.
    """

    report: dict[str, Any]
    identity: str = ""
    fingerprint: str = ""
    name: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    scored: dict[str, Any] | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether the run was stopped early, and so holds neither model nor images."""
        return self.report.get("stage") == ENDED_EARLY


class RunFolder:
    """The record of a run: the run writes it, everything else reads it.

    Args:
        path: need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file, self.plan_file = path / CONFIG, path / "privacy.json"
        self.identity, self.environment = path / "identity.json", path / "environment.json"
        self.nonce = path / "trial_id"
        self.lock, self.log = path / "run.lock", path / "run.log"
        self.charged, self.checkpoints = path / "charged", path / "checkpoints"
        self.metrics, self.early_scores_file = path / "metrics.jsonl", path / "early_scores.json"
        self.evaluation, self.stopped = path / "evaluation.json", path / "stopped.json"
        self.failed = path / "failed.json"
        """Of a run that met numbers that are not finite, and would meet them again."""
        self.error, self.traceback = path / "error.txt", path / "traceback.txt"
        """Why a trial of a sweep ended without a result."""
        self.selected = path / "selected.json"
        """In the best trial of a complete sweep: the objective that chose it."""
        self.model, self.snapshots = path / "model.pt", path / "posthoc_ema"
        self.images, self.grid = path / "synthetic" / IMAGES, path / "synthetic" / GRID
        self.central_grid = path / "central_images" / GRID
        self.frequency_grid = path / "frequency" / GRID
        self.samples, self.private_scores = path / "samples", path / "dp_scores"
        self.non_private, self.slots = path / NON_PRIVATE, path / "slots.json"
        self.inspection = self.non_private / "inspection.json"
        """What the owner's inspection found, beside its page."""
        self.audit = path / "audit.json"
        """The largest epsilon that canaries have proven of the run's plan."""

    def parts(self, identity: str) -> Path:
        """Folder of the images that a run of the identity has drawn so far."""
        return self.images.parent / f"parts-{identity[:16]}"

    def config(self, overrides: Mapping[str, Any] | None = None) -> Config:
        """The configuration as it was resolved."""
        return load(self.config_file, overrides)

    def plan(self) -> PrivacyPlan:
        """The plan that the run began with; nothing is solved again.

        Raises:
            ConfigError: it is missing or damaged.
        """
        try:
            return PrivacyPlan.restored(json.loads(self.plan_file.read_text()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"'{self.plan_file}' cannot be read ({reason}): restore it, or choose a new run "
                "folder"
            ) from error

    def agreed_plan(self, config: Config) -> tuple[PrivacyPlan, bool]:
        """The plan of a run that begins or goes on here, and whether it had begun.

        Raises:
            ConfigError: the folder holds a run of another configuration, or another plan.
            InfeasibleError: the budget cannot pay.
        """
        if not self._has_begun(config):
            return make_plan(config), False
        return resumed_plan(config, self.plan()), True

    @property
    def is_charged(self) -> bool:
        """Whether anything was reserved, or ran; until then the folder takes any configuration."""
        kept = (self.identity, self.evaluation, self.stopped, self.failed)
        steps = (*self.charged.glob(f"*{STEPS_BEGUN}"), *self.checkpoints.glob("*.pt"))
        return bool(steps) or any(path.exists() for path in kept)

    def _has_begun(self, config: Config) -> bool:
        if not self.is_charged:
            return False
        if not self.config_file.exists():
            if self.evaluation.exists() or self.stopped.exists():
                raise ConfigError(
                    f"'{self.path}' holds a result without its {CONFIG}: restore it, or choose a "
                    "new run folder"
                )
            return False
        kept = type(config).model_validate(load_yaml(self.config_file))
        earlier, now = flatten(kept), flatten(config)
        changed = [
            f"{key}: {earlier.get(key)} -> {now[key]}"
            for key in now
            if earlier.get(key) != now[key] and not key.startswith("runtime.")
        ]
        if changed:
            raise ConfigError(
                f"'{self.path}' holds a run of another configuration ({'; '.join(changed)}): "
                "choose a new run folder"
            )
        return True

    def claim(self, config: Config, plan: PrivacyPlan, environment: Mapping[str, Any]) -> None:
        """Writes the plan and, last, the resolved configuration.

        Raises:
            StorageError: the folder cannot be written.
        """
        with storage_errors(self.path):
            write_json(self.plan_file, plan.summary())
            write_json(self.environment, environment)
            write_whole(self.config_file, yaml_subset.dump(nested(config)))

    def begun_with(self) -> tuple[str, str]:
        """Identity with which the run began last, and the digest of its code; empty if unknown."""
        if not self.identity.exists():
            return "", ""
        parts = read_json(self.identity)
        return identity_of(parts), parts[COMPUTED_BY][CODE]

    def result(self) -> Result | None:
        """How the run ended; None while it has not, or has failed.

        Raises:
            ConfigError: the file is damaged.
        """
        for path in (self.evaluation, self.stopped):
            if path.exists():
                content = read_json(path)
                origin = {name: content.pop(name) for name in _ORIGIN if name in content}
                return Result(numbers(content), **origin)
        return None

    def failure(self) -> tuple[str, str] | None:
        """The identity of a run that has failed for good, and its error."""
        if not self.failed.exists():
            return None
        content = read_json(self.failed)
        return content["identity"], content["error"]

    def end(self, result: Result) -> None:
        """Keeps how the run ended.

        Raises:
            StorageError: it cannot be written.
        """
        origin = {name: getattr(result, name) for name in _ORIGIN}
        if result.scored is None:
            del origin["scored"]
        with storage_errors(self.path):
            path = self.stopped if result.is_stopped else self.evaluation
            write_json(path, {**result.report, **origin}, private=True)

    def drop_checkpoints(self) -> None:
        """Removes the states that an interrupted run goes on from, and one that has ended needs no
        more; what was released stays, as nothing may be summed a second time.
        """
        for path in self.checkpoints.glob("*.pt"):
            path.unlink(missing_ok=True)

    def fail(self, identity: str, error: str) -> None:
        """Keeps the error of a run that would fail again."""
        write_json(self.failed, {"identity": identity, "error": error})

    def reports(self) -> Iterator[dict[str, Any]]:
        """Lines of metrics.jsonl but a torn last one, as of a run that goes on or was killed."""
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            try:
                report = json.loads(line)
            except ValueError:
                return
            if isinstance(report, dict):  # Else it was torn within a number.
                yield report

    def early_scores(self, identity: str | None = None) -> dict[float, float]:
        """Early scores by the share of the steps, in their order; of one identity, if given."""
        if not self.early_scores_file.exists():
            return {}
        kept = read_json(self.early_scores_file)
        if identity is not None and kept["identity"] != identity:
            return {}
        return {float(share): score for share, score in kept["scores"].items()}

    def keep_early_scores(self, identity: str, metric: str, scores: Mapping[float, float]) -> None:
        """Keeps the early scores by the share of the steps."""
        named = {str(share): score for share, score in scores.items()}
        write_json(
            self.early_scores_file, {"identity": identity, "metric": metric, "scores": named}
        )


class MetricsLog:
    """Appends reports to metrics.jsonl; a resumed run first drops what it will repeat."""

    def __init__(self, folder: RunFolder, resumed_step: int) -> None:
        text = ""
        for report in folder.reports():  # An evaluation comes again after every resumption.
            if report["stage"] != "evaluation" and report["step"] <= resumed_step:
                text += to_json(report) + "\n"
        write_whole(folder.metrics, text)
        self._file = folder.metrics.open("a")

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Appends one line."""
        self._file.write(to_json(metrics) + "\n")
        self._file.flush()


def write_class_names(folder: Path, names: Sequence[str]) -> None:
    """Writes what the labels 0, 1, ... mean, for a run or a generator.

    The list of classes is a public constant.
    """
    write_json(folder / CLASSES, {"class_names": list(names)})


def class_names(folder: Path, num_classes: int) -> list[str]:
    """What the labels mean; numbers where the run is older than the file."""
    path = folder / CLASSES
    if not path.exists():
        return [str(label) for label in range(num_classes)]
    return read_json(path)["class_names"]
