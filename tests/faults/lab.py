"""A cluster, a tracking server and sweeps of this machine, to be killed; and what must be left.

Everything that the tests start carries a mark in its environment, and only such processes are
looked for or killed.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from leftovers import MARK, marked_processes
from ray.job_submission import JobSubmissionClient

from clusters.local.ports import free_ports
from core.config import load, nested, short_digest
from core.pipeline.context import SweepLink
from core.pipeline.run import run
from core.privacy.keys import MasterSecret
from core.privacy.ledger.ledger import Ledger
from sweep.config.sweep import SweepConfig, load_sweep

ROOT = Path(__file__).resolve().parents[2]
RATE = "private_training.learning_rate"
STEPS = 80
ORIGIN = "0123456789abcdef" * 2
_SWEEP = """
name: {name}
base: {root}/core/configs/digits.yaml
sampler: random
max_concurrent_trials: 1
{head}
fixed:
  privacy.target_epsilon: 1.0
  stage_split: 0.25
  training.num_steps: {steps}
  private_training.expected_batch_size: 60
  private_training.noise_multiplicity: 1
  private_training.max_physical_batch_size: auto
  model.base_channels: 8
  sampler.num_steps: 3
  evaluation.num_images: 60
  evaluation.classifier_epochs: 1
  evaluation.extractor_epochs: 1
  runtime.checkpoint_every: 5
  runtime.log_every: 5
  runtime.num_pictures: 0
  runtime.ledger: runs/ledger
  runtime.device: cpu
search_space:
  {rate}:
    choices: {rates}
"""


def wait_for(
    what: Callable[[], object], name: str, seconds: float = 600, every: float = 0.1
) -> object:
    """What `what` returns when that is first true; asked `every` so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, f"no {name} within {seconds:g} s"
        time.sleep(every)
    return value


@dataclasses.dataclass
class Lab:
    """Where the tests of one cluster work.

    Attributes:
        folder: holds sweeps, secret and the server's data.
        environment: of all that is started.
        nodes: the two nodes' `ray start` processes, head first; each offers one CPU.
    """

    folder: Path
    environment: dict[str, str]
    nodes: list[subprocess.Popen] = dataclasses.field(default_factory=list)
    server: subprocess.Popen | None = None

    def processes(self, title: str | tuple[str, ...] = "") -> list[int]:
        """Marked processes whose command begins so, or in one of these ways, but for this one."""
        found = marked_processes(self.environment[MARK]).items()
        return [pid for pid, command in found if command.startswith(title)]

    def make_whole(self) -> None:
        """Starts what is not there of the server and the nodes."""
        if self.server is None:
            self.start_server()
        if not self.nodes:
            self.start_head()
        while len(self.nodes) < 2:
            self.add_node()
        assert self.alive_nodes() == 2, "an earlier test has left other nodes than it says"

    def start_head(self, cpus: int = 1, home: Path | None = None) -> None:
        gcs, dashboard, client = free_ports(3)
        address = f"127.0.0.1:{gcs}"
        self.environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
        head = (
            *("--head", f"--port={gcs}", f"--dashboard-port={dashboard}"),
            *(f"--ray-client-server-port={client}", "--resources", '{"trial_driver": 8}'),
        )
        self.start_node(*head, cpus=cpus, home=home)
        self.environment["RAY_ADDRESS"] = address

    def add_node(self) -> None:
        """Starts one more node beside the head."""
        self.start_node(f"--address={self.environment['RAY_ADDRESS']}")

    def start_node(self, *arguments: str, cpus: int = 1, home: Path | None = None) -> None:
        """Starts the head, or one more node, and waits until it is there.

        Args:
            home: where its processes hold their data; that of all, if not given.
        """
        number, before = len(self.nodes), self.alive_nodes()
        log = self.folder / f"node {number}.log"

        def is_up_or_gone(node: subprocess.Popen) -> bool:
            return node.poll() is not None or self.alive_nodes() > before

        for _ in range(3):  # Ray gives it half a minute, which a busy machine may exceed.
            node = self._begin_node(log, arguments, cpus, home)
            wait_for(partial(is_up_or_gone, node), f"node {number}", 120, 1)
            if node.poll() is None:
                self.nodes.append(node)
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
        raise AssertionError(log.read_text())

    def _begin_node(
        self, log: Path, arguments: tuple[str, ...], cpus: int, home: Path | None
    ) -> subprocess.Popen:
        listen, grpc = free_ports(2)
        command = (
            *("ray", "start", *arguments, "--block", f"--num-cpus={cpus}"),
            *("--min-worker-port=0", "--max-worker-port=0"),
            f"--dashboard-agent-listen-port={listen}",
            f"--dashboard-agent-grpc-port={grpc}",
            # In one folder each would unpack submitted code over that of the other, in use.
            f"--temp-dir={self.folder}/ray{len(self.nodes)}",
        )
        environment = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        environment |= {"XDG_DATA_HOME": str(home)} if home else {}
        with log.open("w") as file:
            return subprocess.Popen(
                command, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def lose_node(self) -> None:
        """The node that came last vanishes, with its raylet and agents."""
        lost, before = self.nodes.pop(), self.alive_nodes()
        os.killpg(lost.pid, signal.SIGKILL)
        lost.wait()
        wait_for(lambda: self.alive_nodes() < before, "loss of the node", every=1)

    def alive_nodes(self) -> int:
        from ray.util.state import list_nodes

        try:
            nodes = list_nodes(address=self.environment["RAY_API_SERVER_ADDRESS"], timeout=5)
        except Exception:  # Not up yet.
            return 0
        return sum(node.state == "ALIVE" for node in nodes)

    def start_server(self) -> None:
        """Starts the MLflow server, always at the same address."""
        if "MLFLOW_TRACKING_URI" not in self.environment:
            (port,) = free_ports(1)
            self.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
        port = self.environment["MLFLOW_TRACKING_URI"].rpartition(":")[2]
        with (self.folder / "mlflow.log").open("a") as log:
            self.server = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--port", port, "--workers", "1"),
                    *("--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
                    *("--artifacts-destination", f"{self.folder}/artifacts"),
                ],
                env=self.environment | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

        def answers() -> bool:
            try:
                with urllib.request.urlopen(
                    f"{self.environment['MLFLOW_TRACKING_URI']}/health", timeout=2
                ) as answer:
                    return answer.status == 200
            except OSError:
                return False

        wait_for(answers, "answer of the MLflow server", 120, 0.5)

    def stop_server(self) -> None:
        assert self.server is not None
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()
        self.server = None

    def end(self) -> None:
        """Kills all that carries the mark."""
        deadline = time.monotonic() + 15
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)

    def sweep_file(self, name: str, rates: list[float], head: str = "", steps: int = STEPS) -> Path:
        """Writes a sweep's file."""
        file = self.folder / f"{name}.yaml"
        content = {"name": name, "root": ROOT, "head": f"num_trials: {len(rates)}\n{head}"}
        file.write_text(_SWEEP.format(**content, steps=steps, rate=RATE, rates=rates))
        return file

    def sweep(self, name: str, rates: list[float], head: str = "", steps: int = STEPS) -> "Sweep":
        """Writes a sweep's file; its trials draw the noise of `undisturbed` ones."""
        file = self.sweep_file(name, rates, head, steps)
        config = load_sweep(file, {"storage_path": str(self.folder / name / "runs")})
        sweep = Sweep(self, file, config)
        (config.folder / "shared").mkdir(parents=True)
        (config.folder / "shared" / "central_id").write_text(ORIGIN)
        for rate in rates:
            folder = config.folder / "trials" / short_digest(config.trial_config({RATE: rate}))
            folder.mkdir(parents=True)
            (folder / "trial_id").write_text(ORIGIN)
        return sweep


@dataclasses.dataclass
class Sweep:
    """One sweep of the lab; `job` is what was submitted last."""

    lab: Lab
    file: Path
    config: SweepConfig
    job: str = ""

    @property
    def trials(self) -> Path:
        return self.config.folder / "trials"

    def command(self, *overrides: str) -> list[str]:
        storage = f"storage_path={self.config.storage_address or self.config.storage_path}"
        return ["sweep/run.py", "--config", str(self.file), storage, *overrides]

    def start(self, *overrides: str, spoilt: str = "") -> subprocess.Popen:
        """Starts the driver here; `spoilt` names what is done to the workers' code."""
        path = [str(Path(__file__).with_name("spoilt") / spoilt)] if spoilt else []
        return subprocess.Popen(
            [sys.executable, *self.command(*overrides)],
            cwd=ROOT,
            env=self.lab.environment | {"PYTHONPATH": os.pathsep.join(path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def steps(self, driver: subprocess.Popen) -> list[str]:
        """What the trials of a driver that runs have logged, by lines."""
        assert driver.poll() is None, ended(driver)
        files = self.trials.glob("*/metrics.jsonl")
        return [line for path in files for line in path.read_text().splitlines()]

    def finish(self, *overrides: str, spoilt: str = "") -> tuple[int, str]:
        """Runs the driver to its end; returns its exit code and all that it printed."""
        return ended(self.start(*overrides, spoilt=spoilt))

    def submit(self, job: str) -> None:
        """Submits the sweep to the cluster as a job."""
        settings = ["--runtime-env", str(ROOT / "clusters" / "runtime_env.yaml")]
        command = ["--working-dir", str(ROOT), "--", "python", *self.command()]
        self._ray_job("submit", "--no-wait", "--submission-id", job, *settings, *command)
        self.job = job

    def stop(self, job: str) -> None:
        """Stops a job as a user does."""
        self._ray_job("stop", job)

    def printed(self, job: str) -> str:
        return self._jobs().get_job_logs(job)

    def state(self, job: str) -> str:
        return self._jobs().get_job_status(job).value

    def wait_for_state(self, job: str, *states: str) -> None:
        wait_for(lambda: self.state(job) in states, f"end of job {job}", every=1)

    def _jobs(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.lab.environment["RAY_API_SERVER_ADDRESS"])

    def _ray_job(self, *arguments: str) -> None:
        done = subprocess.run(
            ["ray", "job", *arguments],
            env=self.lab.environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def running_trial(self, but: tuple[Path, ...] = ()) -> Path | None:
        """The folder of a trial that has a checkpoint and has not ended."""
        for folder in self.trials.iterdir():
            begun = (folder / "checkpoints" / "last.pt").exists()
            if begun and not (folder / "evaluation.json").exists() and folder not in but:
                return folder
        return None

    def wait_for_trial(self, *but: Path, process: subprocess.Popen | None = None) -> Path:
        """Waits for the next trial of a driver that runs here, or was submitted last."""

        def look() -> Path | None:
            if process is not None:
                assert process.poll() is None, ended(process)
            elif (state := self.state(self.job)) not in ("PENDING", "RUNNING"):
                raise AssertionError(f"job {self.job} {state}: {self.printed(self.job)}")
            return self.running_trial(but)

        found = wait_for(look, "trial with a checkpoint", every=0.1 if process else 0.5)
        assert isinstance(found, Path)
        return found

    def ledger(self) -> Ledger:
        (path,) = (Path(self.config.storage_path) / "ledger").glob("*.jsonl")
        return Ledger.at(path)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    out, err = process.communicate(timeout=900)
    assert "Traceback" not in out
    return process.returncode, out + err


def holder(trial: Path) -> int:
    """Process of rank 0 of a running trial, by its lock; 0 while that is being written."""
    try:
        return json.loads((trial / "run.lock").read_text())["pid"]
    except ValueError:
        return 0


class Undisturbed:
    """Runs of the same keys in one process, without Ray."""

    def __init__(self, folder: Path, secret: Path) -> None:
        self._folder, self._shared, self._secret = folder, folder / "shared", secret
        self._shared.mkdir(parents=True)
        (self._shared / "central_id").write_text(ORIGIN)

    def model(self, trial: Path) -> tuple[dict[str, torch.Tensor], dict]:
        """Parameters and result of the trial's configuration where nothing happens to it."""
        folder = self._folder / trial.name
        if not (folder / "model.pt").exists():
            here = {
                "runtime.ledger": str(folder / "ledger"),
                "runtime.cache": str(self._folder / "cache"),
                "runtime.checkpoint_every": STEPS,
                "runtime.log_every": STEPS,
            }
            config = load(nested(load(trial / "config.yaml")), here)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "trial_id").write_text(ORIGIN)
            secret = MasterSecret(bytes.fromhex(self._secret.read_text().strip()))
            run(
                config,
                folder,
                master=secret,
                name="undisturbed",
                report=lambda _: None,
                link=SweepLink(shared=self._shared),
            )
        result = json.loads((folder / "evaluation.json").read_text())
        return torch.load(folder / "model.pt"), result


def assert_as_undisturbed(sweep: Sweep, undisturbed: Undisturbed) -> None:
    """Every trial: the parameters and epsilon of a quiet run; each charged once, and in full."""
    trials = sorted(path.parent for path in sweep.trials.glob("*/evaluation.json"))
    assert len(trials) == sweep.config.num_trials
    for trial in trials:
        expected, result = undisturbed.model(trial)
        found = torch.load(trial / "model.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
        told = json.loads((trial / "evaluation.json").read_text())
        assert told["identity"] == result["identity"]
        assert told["epsilon"] == result["epsilon"]
        steps = [json.loads(line)["step"] for line in (trial / "metrics.jsonl").open()]
        assert steps == sorted(steps)
    summary = sweep.ledger().summary()
    entries = summary["entries"]
    assert [entry["state"] for entry in entries] == ["committed"] * len(trials)
    assert len({entry["trial"] for entry in entries}) == len(trials)
    assert summary["epsilon_committed_and_reserved"] == summary["epsilon_committed"]


@contextlib.contextmanager
def laboratory(folder: Path) -> Iterator[Lab]:
    """A folder, an environment and a mark; ends what was started."""
    secret = folder / "secret"
    secret.write_text(secrets.token_hex(32))
    secret.chmod(0o600)
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "PYTHONPATH")
    }
    lab = Lab(
        folder,
        kept
        | {
            MARK: str(folder),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "FETA_SWEEP_SECRET_FILE": str(secret),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "160",
        },
    )
    try:
        yield lab
    finally:
        lab.end()
    assert not lab.processes(), "processes of the test are still there"
