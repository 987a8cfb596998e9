"""MLflow: one parent run a sweep, one child a trial, found again rather than created twice.

The only file that imports mlflow.
"""

import json
import logging
import os
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
# A call to a server that is away fails in seconds, not minutes: the outbox repeats it.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.time import get_current_time_millis

from core.errors import ConfigError
from core.release import NON_PRIVATE

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # The outbox tells of retries.

UNREACHABLE = (MlflowException, OSError)
"""What calls raise while the server, its data base or its artifact store does not answer."""
_TEMPORARY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
_CURVES = ("loss", "seconds_per_step")
_KEY = "sweep.key"
_PARENT = "mlflow.parentRunId"
_MAX_BATCH = 100


class Tracker:
    """A run of MLflow that is found by its key, or created.

    Args:
        uri: tracking URI; absolute, as Ray changes the working directory.
        experiment_id: as of `open_experiment`.
        key: `sweep` for the parent, `sweep/trial` for a child; unique in the experiment.
        parent_id: run id of the parent, for a child.
    """

    def __init__(
        self, uri: str, experiment_id: str, key: str, parent_id: str | None = None
    ) -> None:
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.search_runs(
            [experiment_id], filter_string=f"tags.`{_KEY}` = '{key}'", max_results=1
        )
        self._run = found[0] if found else self._create(experiment_id, key, parent_id)
        self.run_id: str = self._run.info.run_id
        self._last_step = int(self._run.data.metrics.get("step", -1))
        self._client.update_run(self.run_id, status="RUNNING")

    def _create(self, experiment_id: str, key: str, parent_id: str | None) -> Run:
        tags = {_KEY: key, **({_PARENT: parent_id} if parent_id else {})}
        return self._client.create_run(experiment_id, tags=tags, run_name=key.rsplit("/", 1)[-1])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs parameters; those that are logged already stay as they are."""
        known = self._run.data.params
        new = [Param(k, str(v)[:6000]) for k, v in params.items() if k not in known]
        for start in range(0, len(new), _MAX_BATCH):
            self._client.log_batch(self.run_id, params=new[start : start + _MAX_BATCH])

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags."""
        self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs a point of the curves, unless a run before a restart has logged it."""
        if step > self._last_step:
            self._last_step = step
            self.log_metrics({**metrics, "step": step}, step)

    def log_missing_steps(self, path: Path) -> None:
        """Logs the points of a run's `metrics.jsonl` that were lost with the process they were in.

        Privacy: the loss is not private.
        """
        known = {point.step for point in self._client.get_metric_history(self.run_id, "step")}
        for line in path.read_text().splitlines():
            report = json.loads(line)
            if "loss" in report and report["step"] not in known:
                self.log_metrics({**curves(report), "step": report["step"]}, report["step"])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Logs numbers at a step."""
        now = get_current_time_millis()
        self._client.log_batch(
            self.run_id, metrics=[Metric(k, float(v), now, step) for k, v in metrics.items()]
        )

    def log_file(self, path: Path, folder: str = "") -> None:
        """Uploads a file, if it exists, as an artifact.

        Raises:
            ValueError: the file is for the owner of the data alone.
        """
        if NON_PRIVATE in path.parts:
            raise ValueError(f"'{path}' is not private and stays out of MLflow")
        if path.exists():
            self._client.log_artifact(self.run_id, str(path), folder or None)

    def finish(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status)


def curves(report: Mapping[str, Any]) -> dict[str, float]:
    """What of a step's report is drawn as curves, by stage."""
    return {f"{report['stage']}/{k}": report[k] for k in _CURVES if k in report}


def is_temporary(error: BaseException) -> bool:
    """Whether the same call may succeed later; False where the server refused its content."""
    return not isinstance(error, MlflowException) or error.error_code in _TEMPORARY


def tracking_uri(storage: Path) -> str:
    """`MLFLOW_TRACKING_URI`, or SQLite in the storage folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage}/mlflow.db"


def reachable(uri: str) -> None:
    """Asks a tracking server for a sign of life; a data base file needs none.

    Raises:
        ConfigError: it does not answer, or refuses.
    """
    if not uri.startswith("http"):
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10) as answer:
            answer.read()
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except (OSError, MlflowException) as error:
        raise ConfigError(
            f"MLFLOW_TRACKING_URI={uri} does not answer ({error}): start the server, correct the "
            "address, or allow this host with --allowed-hosts"
        ) from None


def open_experiment(uri: str, name: str, storage: Path) -> str:
    """Id of the experiment; creates it, and the data base, if there is none."""
    storage.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=uri)
    if (experiment := client.get_experiment_by_name(name)) is not None:
        return experiment.experiment_id
    local = uri.startswith("sqlite:")
    artifacts = (storage / "mlartifacts").as_uri() if local else None
    return client.create_experiment(name, artifact_location=artifacts)


def unfinished(uri: str, experiment_id: str, sweep: str) -> set[str]:
    """Keys of the sweep and of its trials whose runs have not ended as FINISHED."""
    client = MlflowClient(tracking_uri=uri)
    found = client.search_runs(
        [experiment_id], filter_string=f"tags.`{_KEY}` LIKE '{sweep}%'", max_results=50_000
    )
    keys = {run.data.tags[_KEY]: run.info.status for run in found}
    return {k for k, status in keys.items() if k.split("/")[0] == sweep and status != "FINISHED"}


def kill_stale(uri: str, experiment_id: str, parent_id: str, sweep: str) -> None:
    """Marks children that an interrupted driver left running; those tried again are reopened."""
    client = MlflowClient(tracking_uri=uri)
    for run in client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{_PARENT}` = '{parent_id}' and attributes.status = 'RUNNING'",
    ):
        if run.data.tags.get(_KEY, "").startswith(f"{sweep}/"):
            client.set_terminated(run.info.run_id, "KILLED")


def ui_command(uri: str) -> str:
    """The command that opens the MLflow UI on this data."""
    if uri.startswith("http"):
        return f"open {uri}"
    program = Path(sys.executable).with_name("mlflow")
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return f"{program} ui --backend-store-uri {uri}"
