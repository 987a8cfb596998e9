"""A small sweep on disk, as a real one is written, but without Ray; a cluster; a real browser.

Set FETA_SWEEP_ARTIFACTS to a folder to keep the screenshots.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import torch
from leftovers import MARK, OF_TRIALS, assert_none_left

from core.config import short_digest
from core.errors import UserError
from core.io.files import write_json
from core.io.locks import locked
from core.pipeline.run import run
from core.privacy.keys import SECRET_FILE_VARIABLE, MasterSecret
from sweep.config.sweep import SweepConfig, dump_sweep, load_sweep
from sweep.driver.cluster import DRIVER_RESOURCE
from sweep.search.study import distributions, open_storage

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ROOT = Path(__file__).resolve().parents[2]
SWEEP = f"""
name: small
base: {ROOT}/core/configs/digits.yaml
num_trials: 13
fixed:
  training.num_steps: 6
  privacy.target_epsilon: 3.0
  private_training.expected_batch_size: 40
  private_training.noise_multiplicity: 1
  model.base_channels: 8
  sampler.num_steps: 3
  evaluation.num_images: 60
  evaluation.classifier_epochs: 4
  evaluation.extractor_epochs: 1
  runtime.log_every: 1
  runtime.ledger: runs/ledger
search_space:
  central_images.per_class:
    low: 1
    high: 400
    log: true
  central_images.noise_multiplier:
    low: 1.0
    high: 20.0
    log: true
  stage_split:
    low: 0.0
    high: 0.6
  private_training.learning_rate:
    choices: [1e-4, 1e-3, 1e-2]
  dataset.name:
    choices: [digits, idx]
"""
# Four plans to solve, not twelve: the learning rate costs no privacy.
PLANS = ((2, 3.0, 0.5), (20, 9.0, 0.3), (5, 12.0, 0.5), (2, 3.0, 0.0))
PRUNED = (400, 1.1, 0.5)
KEYS = ("central_images.per_class", "central_images.noise_multiplier", "stage_split")


def train(sweep: SweepConfig, point: dict) -> None:
    """What a trial leaves behind, also where its workers refuse it."""
    config = sweep.trial_config(point)
    folder = sweep.folder / "trials" / short_digest(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trial_id").write_text("always the same")  # Else other noise, and scores, each time.
    secret = MasterSecret(b"s" * 32)
    try:
        run(config, folder, master=secret, name=sweep.name, report=lambda _: None)
    except UserError as error:
        (folder / "error.txt").write_text(f"{error}\n")


@pytest.fixture(scope="session")
def storage(tmp_path_factory, worker_id) -> Path:
    """A storage folder with a complete sweep, `small`, and one that has no trial yet, `new`.

    All test processes copy what the first of them makes.
    """
    own = tmp_path_factory.getbasetemp()
    made = (own if worker_id == "master" else own.parent) / "small"
    with locked(made / "lock", patience=600):
        if not (made / "runs").exists():
            make_storage(made)
    copy = shutil.copytree(made / "runs", tmp_path_factory.mktemp("copy") / "runs")
    for path in (*copy.rglob("config.yaml"), *copy.rglob("sweep.json")):
        times = path.stat()
        path.write_text(path.read_text().replace(str(made / "runs"), str(copy)))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # Trials stand in this order.
    return copy


def make_storage(folder: Path) -> None:
    torch.set_num_threads(1)
    (folder / "sweep.yaml").write_text(SWEEP)
    storage = folder / "runs"
    overrides = {"storage_path": str(storage)}
    new = load_sweep(folder / "sweep.yaml", {**overrides, "name": "new"})
    sweep = load_sweep(folder / "sweep.yaml", overrides)
    for each in (new, sweep):
        write_json(each.folder / "sweep.json", dump_sweep(each))
    others = {"private_training.learning_rate": 1e-3, "dataset.name": "digits"}
    for rate in (1e-4, 1e-3, 1e-2):
        for plan in PLANS:
            point = dict(zip(KEYS, plan, strict=True)) | others
            train(sweep, point | {"private_training.learning_rate": rate})
    train(sweep, dict(zip(KEYS, PLANS[0], strict=True)) | others | {"dataset.name": "idx"})
    study = optuna.create_study(study_name=sweep.name, storage=open_storage(sweep.folder))
    trial = optuna.trial.create_trial(
        state=optuna.trial.TrialState.PRUNED,
        params=dict(zip(KEYS, PRUNED, strict=True)) | others,
        distributions=distributions(sweep),
    )
    study.add_trial(trial)


@pytest.fixture(scope="session")
def joined(_private_folders, tmp_path_factory) -> Iterator[dict[str, str]]:
    """What a driver's environment needs to join a cluster, which is sooner than to start one.

    When all sweeps of the cluster have ended, none of their trials may have left a process.
    """
    import ray

    mark = str(tmp_path_factory.mktemp("joined"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, mark)
        ray.init(
            address="local",
            num_cpus=2,
            resources={DRIVER_RESOURCE: 2},
            include_dashboard=False,
            log_to_driver=False,
            _system_config={"prestart_worker_first_driver": False},  # As a sweep's own.
        )
    address = ray.get_runtime_context().gcs_address
    # The secret is that of the cluster's processes.
    yield {SECRET_FILE_VARIABLE: os.environ[SECRET_FILE_VARIABLE], "RAY_ADDRESS": address}
    assert_none_left(mark, titles=OF_TRIALS)
    ray.shutdown()
    assert_none_left(mark)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: the extra `dev`"
    )
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser ({', '.join(BROWSERS)}) found: apt-get install -y chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory) -> Path:
    kept = os.environ.get("FETA_SWEEP_ARTIFACTS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
