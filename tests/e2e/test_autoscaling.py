"""A submitted sweep on a real autoscaling cluster of this machine (Ray's fake nodes)."""

import os
import re
import subprocess
import sys

from leftovers import MARK, assert_none_left
from mlflow.tracking import MlflowClient
from tiny_sweep import ROOT, sweep_text

from core.privacy.ledger import Ledger

HEAD = """num_trials: 2
workers_per_trial: 1
cpus_per_worker: 2"""
SWEEP = sweep_text("scaled", HEAD, num_steps=60)
SUBMIT = "ray job submit --runtime-env {root}/clusters/runtime_env.yaml --working-dir {root}"
RUN = "-- python sweep/run.py --config {folder}/sweep.yaml"
# Refused; stopped at its first checkpoint; submitted again to the end.
STORY = f"""
if {SUBMIT} {RUN}; then exit 11; fi
{SUBMIT} --no-wait --submission-id first {RUN} storage_path={{folder}}/runs || exit 12
for i in $(seq 300); do
    ls {{folder}}/runs/scaled/trials/*/checkpoints/last.pt 2>/dev/null && break
    sleep 0.5
done
ray job stop first
ray job logs first
ray job status first
finished=$(ls {{folder}}/runs/scaled/trials/*/evaluation.json 2>/dev/null | wc -l)
echo "finished at the stop: $finished"
{SUBMIT} {RUN} storage_path={{folder}}/runs
"""


def test_submitted_stopped_and_submitted_again_on_workers_that_come_and_go(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    story = STORY.format(root=ROOT, folder=tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment[MARK] = str(tmp_path)
    ended = subprocess.run(
        [sys.executable, ROOT / "clusters" / "local" / "cluster.py", "--", "bash", "-c", story],
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
    assert "'first' was stopped" in told
    at_the_stop = re.search(r"finished at the stop: (\d)", told)
    assert at_the_stop is not None
    if int(at_the_stop[1]) < 2:  # Else the stop found nothing left to do.
        assert "the same command goes on where it stopped" in told
    assert "best trial: " in told
    counts = [int(n) for n in re.findall(r"workers: \d+ -> (\d+)", "\n".join(timeline))]
    # Each trial fills a node; those of the stopped job may still be there.
    assert 2 <= max(counts) <= 4, timeline
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
