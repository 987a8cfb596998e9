"""MLflow: one parent run a sweep, one child a trial, found again rather than created twice.

With `sweep.tracking.store` the only file that imports mlflow.
"""

import base64
import hashlib
import json
import math
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sweep.tracking.store import ACTIVE, file_of, reachable, ui_command, usable, without_user
from sweep.tracking.store import open_experiment as open_experiment
from sweep.tracking.store import reason as reason
from sweep.tracking.store import tracking_uri as tracking_uri

# isort: split
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    Metric,
    Param,
    Run,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.time import get_current_time_millis
from PIL import Image, UnidentifiedImageError

from core.errors import ConfigError
from core.record.early import ENDED_EARLY
from core.record.folder import NON_PRIVATE

UNREACHABLE = (MlflowException, OSError)
"""What calls raise while the server, its data base or its artifact store does not answer."""
_TEMPORARY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
_KEY = "sweep.key"
_PARENT = "mlflow.parentRunId"
STATE = "sweep.state"
_MAX_BATCH, _MAX_POINTS = 100, 1000
"""Parameters and points that one call takes."""
_MAX_COMPARED = 100
"""Trials in the table of a comparison; more are slow to open."""
_LOCAL_UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` listens."""


class Tracker:
    """A run of MLflow that is found by its key, or created; what it has is not logged again.

    Args:
        uri: tracking URI; absolute, as Ray changes the working directory.
        experiment_id: as of `open_experiment`.
        key: `sweep` for the parent, `sweep/trial` for a child; unique in the experiment.
        parent_id: run id of the parent, for a child.
    """

    def __init__(
        self, uri: str, experiment_id: str, key: str, parent_id: str | None = None
    ) -> None:
        self._client, self._key = MlflowClient(tracking_uri=uri), key
        self._is_server = uri.startswith("http")
        found = self._client.search_runs(
            [experiment_id], filter_string=f"tags.`{_KEY}` = '{key}'", max_results=1
        )
        self._run = found[0] if found else self._create(experiment_id, key, parent_id)
        self.run_id: str = self._run.info.run_id
        self._params = set(self._run.data.params)
        self._steps: dict[str, set[int]] = {}
        self._pictures: set[tuple[str, int]] | None = None
        self._has_dataset = bool(self._run.inputs and self._run.inputs.dataset_inputs)
        self._client.update_run(self.run_id, status="RUNNING")

    def _create(self, experiment_id: str, key: str, parent_id: str | None) -> Run:
        tags = {_KEY: key, **({_PARENT: parent_id} if parent_id else {})}
        return self._client.create_run(experiment_id, tags=tags, run_name=key.rsplit("/", 1)[-1])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs parameters; those that are logged already stay as they are."""
        new = [Param(k, str(v)[:6000]) for k, v in params.items() if k not in self._params]
        for start in range(0, len(new), _MAX_BATCH):
            self._client.log_batch(self.run_id, params=new[start : start + _MAX_BATCH])
        self._params |= params.keys()

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags."""
        self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def log_points(self, points: Iterable[tuple[str, int, float]]) -> None:
        """Logs name, step and value of points; each name and step once, also after a restart."""
        new = {(name, at): value for name, at, value in points if at not in self._known(name)}
        now = get_current_time_millis()
        metrics = [Metric(name, float(value), now, at) for (name, at), value in new.items()]
        for start in range(0, len(metrics), _MAX_POINTS):
            batch = metrics[start : start + _MAX_POINTS]
            self._client.log_batch(self.run_id, metrics=batch)
            for metric in batch:
                self._known(metric.key).add(metric.step)

    def _known(self, name: str) -> set[int]:
        """Steps at which a metric is logged."""
        if name not in self._steps:
            has = name in self._run.data.metrics
            points = self._client.get_metric_history(self.run_id, name) if has else []
            self._steps[name] = {point.step for point in points}
        return self._steps[name]

    def log_figures(self, figures: Mapping[str, float]) -> None:
        """Logs numbers without a step that may change later, where they are not the last."""
        last, now = self._client.get_run(self.run_id).data.metrics, get_current_time_millis()
        new = [Metric(k, float(v), now, 0) for k, v in figures.items() if last.get(k) != v]
        self._client.log_batch(self.run_id, metrics=new)

    def withdraw_figures(self, names: Iterable[str]) -> None:
        """Makes those that the run has "not a number", as MLflow forgets none."""
        last = self._client.get_run(self.run_id).data.metrics
        if stated := [name for name in names if not math.isnan(last.get(name, math.nan))]:
            self.log_figures(dict.fromkeys(stated, math.nan))

    def log_file(self, path: Path, folder: str = "") -> None:
        """Uploads a file, if it exists, as an artifact.

        Raises:
            ValueError: the file is for the owner of the data alone.
        """
        _require_publishable(path)
        if path.exists():
            self._client.log_artifact(self.run_id, str(path), folder or None)

    def log_picture(self, key: str, step: int, path: Path) -> None:
        """Logs a PNG file as the image of a key at a step; once, also after a restart."""
        _require_publishable(path)
        if self._pictures is None:
            found = self._client.list_artifacts(self.run_id, "images")
            names = [Path(file.path).name.split("+") for file in found]  # key+step+STEP+...
            self._pictures = {(name[0], int(name[2])) for name in names}
        if (key, step) not in self._pictures:
            with Image.open(path) as image:
                self._client.log_image(self.run_id, image, key=key, step=step)
            self._pictures.add((key, step))

    def log_dataset(self, name: str, facts: Mapping[str, Any]) -> None:
        """Says once on which data set the run is trained, by public facts alone.

        Privacy: the digest is that of the facts; the content's never leaves the ledger.
        """
        if self._has_dataset:
            return
        text = json.dumps(facts, sort_keys=True)
        rows = json.dumps({"num_rows": facts["num_examples"]})
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        dataset = Dataset(name, digest, source_type="public facts", source=text, profile=rows)
        tags = [InputTag("mlflow.data.context", "training")]
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])
        self._has_dataset = True

    def log_charts(self, name: str, state: str) -> None:
        """Saves a state of the page of runs, JSON, with the experiment.

        The page stores its own in the same way when a person shares a view.
        """
        content = base64.b64encode(zlib.compress(state.encode(), 9)).decode()
        experiment_id = self._run.info.experiment_id
        self._client.set_experiment_tag(
            experiment_id, f"mlflow.sharedViewState.{name}", f"deflate;{content}"
        )

    def register_generator(self, trial: str, run_dir: Path, scope: str, statement: str) -> None:
        """Logs the generator of one of the sweep's trials as a model and registers it, once.

        `mlflow.pyfunc.load_model("models:/SWEEP@best")` gives it on any machine with torch: labels
        in, images out.

        Args:
            scope: `privacy.scope`, a tag of the version.
            statement: of the privacy card, its description.

        Privacy: averaged weights and the public configuration, post-processing of a private model;
            the caller decides which trial may leave.
        """
        client, sweep, experiment_id = self._client, self._key, self._run.info.experiment_id
        run_id = self._run_of(trial)
        try:
            client.create_registered_model(sweep)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = client.search_model_versions(f"name = '{sweep}' and run_id = '{run_id}'")
        if known:
            version = known[0].version
        else:
            model = client.create_logged_model(experiment_id, "generator", source_run_id=run_id)
            with tempfile.TemporaryDirectory() as folder:
                _save_model(run_dir, Path(folder), model.model_id)
                client.log_model_artifacts(model.model_id, f"{folder}/model")
            client.finalize_logged_model(model.model_id, "READY")
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
            version = client.create_model_version(
                sweep,
                # A server takes the name alone; without one the name means another data base.
                f"models:/{model.model_id}" if self._is_server else model.artifact_location,
                run_id,
                tags={"trial": trial, "privacy.scope": scope},
                description=statement,
                model_id=model.model_id,
            ).version
        client.set_registered_model_alias(sweep, "best", version)

    def _run_of(self, trial: str) -> str:
        """Id of a trial's run; restored if it was deleted, new if it is gone."""
        place, key = self._run.info.experiment_id, f"{self._key}/{trial}"
        found = self._client.search_runs([place], f"tags.`{_KEY}` = '{key}'", ViewType.ALL)
        if not found:
            return self._create(place, key, self.run_id).info.run_id
        active = [run for run in found if run.info.lifecycle_stage == ACTIVE]
        if not active:
            self._client.restore_run(found[0].info.run_id)
        return (active or found)[0].info.run_id

    def restored(self) -> bool:
        """Restores the run if it was deleted in MLflow's UI; whether it was."""
        if self._client.get_run(self.run_id).info.lifecycle_stage == ACTIVE:
            return False
        self._client.restore_run(self.run_id)
        return True

    def finish(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status)


def is_temporary(error: BaseException) -> bool:
    """Whether the same call may succeed later; False where its content is refused or not there."""
    if isinstance(error, FileNotFoundError | UnidentifiedImageError):  # Here, not at the server.
        return False
    return not isinstance(error, MlflowException) or error.error_code in _TEMPORARY


def known_runs(uri: str, experiment: str, sweep: str) -> dict[str, Run]:
    """The runs of a sweep and of its trials by key; deleted ones where there is no other."""
    client = MlflowClient(tracking_uri=uri)
    if (place := client.get_experiment_by_name(experiment)) is None:
        return {}
    condition = f"tags.`{_KEY}` LIKE '{sweep}%'"
    runs = client.search_runs([place.experiment_id], condition, ViewType.ALL, max_results=50_000)
    found = [run for run in runs if run.data.tags[_KEY].split("/")[0] == sweep]
    found.sort(key=lambda run: run.info.lifecycle_stage == ACTIVE)
    return {run.data.tags[_KEY]: run for run in found}


def forget_runs(uri: str, experiment: str, sweep: str) -> None:
    """Deletes the runs of a sweep that was refused before anything was charged.

    Raises:
        ConfigError: MLflow cannot be used.
    """
    with usable(uri):
        client = MlflowClient(tracking_uri=uri)
        for run in known_runs(uri, experiment, sweep).values():
            if status_of(run) != "DELETED":
                client.delete_run(run.info.run_id)


def status_of(run: Run) -> str:
    """MLflow's status, but `DELETED`, or `STOPPED` of a trial that was stopped early."""
    if run.info.lifecycle_stage != ACTIVE:
        return "DELETED"
    # Which MLflow counts as killed.
    stopped = run.info.status == "KILLED" and run.data.tags.get(STATE) == ENDED_EARLY
    return "STOPPED" if stopped else run.info.status


def kill_stale(uri: str, experiment: str, parent_id: str, sweep: str) -> None:
    """Makes the parent that of all the sweep's trials; another may have been deleted.

    Marks trials that an interrupted driver left running; those tried again are reopened.
    """
    client = MlflowClient(tracking_uri=uri)
    for run in known_runs(uri, experiment, sweep).values():
        run_id, status = run.info.run_id, status_of(run)
        if run_id == parent_id or status == "DELETED":
            continue
        if run.data.tags.get(_PARENT) != parent_id:
            client.set_tag(run_id, _PARENT, parent_id)
        if status == "RUNNING":
            client.set_terminated(run_id, "KILLED")


def _save_model(run_dir: Path, folder: Path, model_id: str) -> None:
    import numpy
    import pydantic
    import safetensors
    import torch
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    import core
    from core.generation.generator import write_generator
    from core.record.folder import RunFolder, class_names

    config = RunFolder(run_dir).config()
    names = class_names(run_dir, config.dataset.num_classes)
    write_generator(folder / "generator", RunFolder(run_dir).model, config, names)
    image = (config.dataset.channels, config.dataset.image_size, config.dataset.image_size)
    needed = (torch, numpy, pydantic, safetensors)
    packages = {each.__name__: each.__version__.split("+")[0] for each in needed}
    with warnings.catch_warnings(action="ignore"):  # That there is no example of an input.
        pyfunc.save_model(
            folder / "model",
            loader_module="core.generation.generator",
            data_path=str(folder / "generator"),
            code_paths=[str(Path(core.__file__).parent)],
            mlflow_model=Model(model_id=model_id),
            metadata={"class_names": names},
            signature=ModelSignature(
                Schema([TensorSpec(numpy.dtype("int64"), (-1,))]),
                Schema([TensorSpec(numpy.dtype("uint8"), (-1, *image))]),
                ParamSchema([ParamSpec("seed", "long", config.seed)]),
            ),
            pip_requirements=[f"{name}=={version}" for name, version in packages.items()],
        )


def _require_publishable(path: Path) -> None:
    if NON_PRIVATE in path.parts:
        raise ValueError(f"'{path}' is not private and stays out of MLflow")


def how_to_compare(uri: str, experiment: str, sweep: str) -> str:
    """What opens the MLflow UI, and there a sweep's charts and the table of its finished trials.

    The addresses are left out if the sweep is not recorded, or the server does not answer. Other
    trials have no figures to compare, and MLflow's table breaks on runs without artifacts.
    """
    lines, known = [ui_command(uri)], dict[str, Run]()
    try:
        with usable(uri):
            if (path := file_of(uri)) is None or path.exists():
                reachable(uri)
                known = known_runs(uri, experiment, sweep)
    except ConfigError as error:
        lines += [f"  {error}"]
    states = {run.info.run_id: status_of(run) for key, run in known.items() if key != sweep}
    if set(states.values()) - {"DELETED"}:
        page = without_user(uri).rstrip("/") if uri.startswith("http") else _LOCAL_UI
        number = next(iter(known.values())).info.experiment_id
        query = f"compareRunsMode=CHART&viewStateShareKey={sweep}"
        lines += [f"  charts: {page}/#/experiments/{number}/runs?{query}"]
        if trials := [run_id for run_id, state in states.items() if state == "FINISHED"]:
            chosen, where = (
                quote(json.dumps(ids, separators=(",", ":")))
                for ids in (trials[:_MAX_COMPARED], [number])
            )
            lines += [f"  table: {page}/#/compare-runs?runs={chosen}&experiments={where}"]
    return "\n".join(lines)
