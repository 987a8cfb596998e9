"""Charts of MLflow's comparison of trials, with the few parameters and figures that they show.

The whole configuration is an artifact; a column is worth its place only if a person compares by it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.config import Config, flatten
from core.config.keys import COUNT, NOISE
from core.config.metrics import DIRECTIONS
from core.record.early import STAGE
from core.record.folder import RunFolder
from sweep.config.sweep import SweepConfig

_COMPARED = (
    COUNT,
    NOISE,
    "stage_split",
    "dataset.name",
    "privacy.scope",
    "privacy.target_epsilon",
    "training.num_steps",
    "private_training.learning_rate",
    "private_training.expected_batch_size",
    "private_training.noise_multiplicity",
    "private_training.max_grad_norm",
    "model.base_channels",
    "sampler.num_steps",
    "seed",
)
_CURVES = ("loss", "seconds_per_step")
SAMPLES, CENTRAL_IMAGES, FREQUENCY = "samples", "central_images", "frequency"
"""Keys of pictures: `samples` over the steps of training, the last of them of the result."""

_SECTIONS = (
    {"uuid": "parallel", "name": "Settings and results", "columns": 1, "cardHeight": 330},
    {"uuid": "scatter", "name": "Objective by setting", "columns": 3, "cardHeight": 330},
    {"uuid": "pictures", "name": "Pictures", "columns": 1, "cardHeight": 400},
    {"uuid": "curves", "name": "Loss of both stages", "columns": 2, "cardHeight": 330},
)
"""Of the page of charts, from the top."""


def compared_params(sweep: SweepConfig, config: Config) -> dict[str, Any]:
    """The parameters of a trial by dotted key: what is searched, then what matters most."""
    flat = flatten(config)
    return {key: flat[key] for key in (*sweep.search_space, *_COMPARED)}


def shared_params(sweep: SweepConfig) -> dict[str, Any]:
    """The same of what all trials of a sweep share."""
    params = compared_params(sweep, sweep.run)
    return {key: value for key, value in params.items() if key not in sweep.search_space}


def compared_figures(sweep: SweepConfig, result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a trial that ended under the names that all trials share.

    Args:
        result: as of `core.pipeline.run.run`.

    Returns:
        Scores; `epsilon_trial`; `epsilon_central_share`, the central images' epsilon over it;
        `noise_multiplier` of DP-SGD; `seconds`; `gpu_hours`, GPUs reserved times hours.

    Privacy: scores may be computed from real images: see their tags.
    """
    names = [*DIRECTIONS, sweep.run.early_metric]
    scores = {name: float(result[name]) for name in names if name in result}
    central = result.get("epsilon_central")  # Of a trial that was stopped it is not known apart.
    gpus = sweep.workers_per_trial * sweep.gpus_per_worker
    return {
        **scores,
        "epsilon_trial": result["epsilon"],
        **({} if central is None else {"epsilon_central_share": central / result["epsilon"]}),
        "noise_multiplier": result["noise_multiplier"],
        "seconds": result["seconds"],
        "gpu_hours": gpus * result["seconds"] / 3600,
    }


def points(reports: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, int, float]]:
    """Name, step and value of what is drawn as curves: by stage, machine use, early scores.

    Privacy: the loss is not private.
    """
    for report in reports:
        if "loss" in report:
            drawn = {f"{report['stage']}/{k}": report[k] for k in _CURVES if k in report}
            drawn |= {k: v for k, v in report.items() if k.startswith("system/")}
            drawn["step"] = report["step"]
        elif report["stage"] == STAGE:
            drawn = {k: v for k, v in report.items() if k.startswith("early_")}
        else:
            continue
        yield from ((name, report["step"], value) for name, value in drawn.items())


def pictures(run_dir: Path, step: int, finished: bool) -> Iterator[tuple[str, int, Path]]:
    """Key, step and file of every picture that a trial has written up to a step.

    Privacy: post-processing of what the trial has paid for.
    """
    folder = RunFolder(run_dir)
    released = ((CENTRAL_IMAGES, folder.central_grid), (FREQUENCY, folder.frequency_grid))
    for key, path in released if step >= 0 else ():  # Written before the first step.
        if path.exists():
            yield key, 0, path
    for path in sorted(folder.samples.glob("*.png")):
        if int(path.stem) <= step:
            yield SAMPLES, int(path.stem), path
    if finished and folder.grid.exists():
        yield SAMPLES, step, folder.grid


def public_facts(config: Config) -> dict[str, Any]:
    """What is public about the data set; never its content's digest, nor where it lies."""
    return config.dataset.model_dump(mode="json", exclude={"path"})


def charts(sweep: SweepConfig, parent_id: str) -> str:
    """The state, as JSON, of MLflow's page of runs that compares a sweep's trials without set-up.

    It is what the page itself stores under "Share": here the trials of one parent run, all shown,
    the best first, with parallel coordinates, one scatter plot for each searched number, the
    pictures, and the losses of both stages.
    """
    metric, searched = sweep.objective.metric, list(sweep.search_space)
    fid = "fid_cnn" if sweep.run.evaluation.fid_extractor == "cnn" else "fid"
    scores = list(dict.fromkeys((metric, "accuracy", fid)))
    costs = ["epsilon_trial", "epsilon_central_share", "noise_multiplier"]
    numeric = [key for key in searched if sweep.search_space[key].choices is None]
    cards: list[dict[str, Any]] = []

    def card(section: str, kind: str, **more: Any) -> None:
        cards.append({"uuid": f"{section} {len(cards)}", "type": kind, "metricSectionId": section})
        cards[-1].update({"deleted": False, "isGenerated": False, **more})

    shown = ["epsilon_central_share", "noise_multiplier", *reversed(scores)]
    card("parallel", "PARALLEL", selectedParams=searched, selectedMetrics=shown)
    for key in numeric:
        x, y = {"key": key, "type": "PARAM"}, {"key": metric, "type": "METRIC"}
        card("scatter", "SCATTER", xaxis=x, yaxis=y, runsCountToCompare=100)
    for key, step in ((SAMPLES, sweep.run.training.num_steps), (CENTRAL_IMAGES, 0)):
        card("pictures", "IMAGE", imageKeys=[key], step=step, showRunParams=False)
    for stage in ("warm_up", "private_training"):
        card("curves", "LINE", metricKey=f"{stage}/loss", selectedMetricKeys=[f"{stage}/loss"])
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent_id}'",
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": DIRECTIONS[metric] == "minimize",
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": [f"params.`{key}`" for key in searched]
        + [f"metrics.`{name}`" for name in (*scores, *costs, "seconds", "gpu_hours")],
        "compareRunCharts": cards,
        "compareRunSections": [
            {**section, "display": True, "isReordered": True} for section in _SECTIONS
        ],
        "isAccordionReordered": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0},
    }
    return json.dumps(state)
