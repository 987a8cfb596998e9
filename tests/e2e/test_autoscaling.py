"""A submitted sweep on a real autoscaling cluster of this machine (Ray's fake nodes)."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from leftovers import MARK, assert_none_left
from mlflow.tracking import MlflowClient
from refusing_provider import REASON
from tiny_sweep import ROOT, sweep_text

from core.privacy.ledger.ledger import Ledger

HEAD = """num_trials: 2
workers_per_trial: 1
cpus_per_worker: 2"""
SWEEP = sweep_text("scaled", HEAD)
SUBMIT = "ray job submit --runtime-env {root}/clusters/runtime_env.yaml --working-dir {root}"
RUN = "-- python sweep/run.py --config {folder}/sweep.yaml"
STORY = f"""
if {SUBMIT} {RUN}; then exit 11; fi  # Refused.
{SUBMIT} {RUN} storage_path={{folder}}/runs
"""


CLUSTER = [sys.executable, ROOT / "clusters" / "local" / "cluster.py", "--", "bash", "-c"]
# Ray ends a head of which a part has ended, as when another program has taken its port.
SERVER = "ray.util.client.server --address=[^ ]*:${RAY_ADDRESS#*:} "
KILL_HEAD = f'pkill -KILL -f "{SERVER}" && sleep 5'


def test_a_submitted_sweep_runs_on_workers_that_come_and_go(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    story = STORY.format(root=ROOT, folder=tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment[MARK] = str(tmp_path)
    ended = subprocess.run(
        [*CLUSTER, story],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    timeline = [line for line in ended.stdout.splitlines() if line.startswith("[ ")]
    print(ended.stdout)
    told = ended.stdout + ended.stderr
    assert ended.returncode == 0, told

    assert "lies in the copy that Ray made of the submitted folder" in told
    assert "best trial: " in told
    counts = [int(n) for n in re.findall(r"workers: \d+ -> (\d+)", "\n".join(timeline))]
    assert max(counts) == 2, timeline  # Each trial fills a node.
    assert counts[-1] == 0, timeline

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("feta-sweep")
    assert experiment is not None
    trials = client.search_runs(
        [experiment.experiment_id], filter_string="tags.`sweep.key` LIKE 'scaled/%'"
    )
    assert [trial.info.status for trial in trials] == ["FINISHED"] * 2
    for trial in trials:
        steps = [m.step for m in client.get_metric_history(trial.info.run_id, "step")]
        assert steps == sorted(set(steps))
    (ledger,) = (tmp_path / "runs" / "ledger").glob("*.jsonl")
    entries = Ledger.at(ledger).summary()["entries"]
    assert [entry["state"] for entry in entries] == ["committed"] * 2
    assert_none_left(str(tmp_path), 0)


REFUSED = """
import sys, yaml
from pathlib import Path
from clusters.local import cluster
config = yaml.safe_load(cluster._CONFIG.read_text())
config["provider"]["module"] = "refusing_provider.Provider"
cluster._CONFIG = Path("refusing.yaml")
cluster._CONFIG.write_text(yaml.safe_dump(config))
sys.exit(cluster.main(sys.argv[1:]))
"""


def test_a_quota_of_nought_is_told_and_ends_the_sweep(tmp_path):
    (tmp_path / "sweep.yaml").write_text(sweep_text("refused", HEAD))
    run = [sys.executable, ROOT / "sweep" / "run.py", "--config", "sweep.yaml", "max_wait=0.5"]
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    ended = subprocess.run(
        [sys.executable, "-c", REFUSED, "--", *run],
        cwd=tmp_path,
        env=os.environ | {MARK: str(tmp_path), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    told = ended.stdout + ended.stderr
    assert ended.returncode == 2, told
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    for part in ("one trial needs", "max_wait=0.5", REASON, "raise the cloud's quota"):
        assert part in line
    assert "Traceback" not in ended.stderr
    assert_none_left(str(tmp_path), 30)


def test_a_head_that_ended_by_itself_is_told_and_leaves_its_logs_alone(tmp_path):
    ended = subprocess.run(
        [*CLUSTER, KILL_HEAD],
        env=os.environ | {MARK: str(tmp_path), "TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    *_, told = ended.stderr.splitlines()
    found = re.fullmatch(r"error: Ray's head ended by itself \(exit code \d+\): see (\S+) .*", told)
    assert found, told
    log = Path(found[1])
    assert "ray_client_server" in log.read_text()
    assert (log.parent / "session_latest" / "logs").is_dir()
    shutil.rmtree(log.parent)
    assert_none_left(str(tmp_path), 30)
