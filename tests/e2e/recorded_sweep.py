"""Records a sweep that lies on disk in MLflow, by the functions that a real one uses."""

import json
from collections.abc import Sequence

from sweep.config.sweep import SweepConfig
from sweep.results.table import Row, stored_result
from sweep.tracking.client import Tracker, open_experiment
from sweep.tracking.content import (
    record_end,
    record_start,
    record_step,
    record_summary,
    record_sweep,
)
from sweep.trials.machine import MachineUse


def record(sweep: SweepConfig, rows: Sequence[Row], uri: str) -> str:
    """Sends all that the trials reported; returns the parent's run id."""
    experiment = open_experiment(uri, sweep.experiment, sweep.folder.parent)
    parent = Tracker(uri, experiment, sweep.name)
    record_sweep(parent, parent.run_id, sweep, len(rows))
    use = MachineUse()
    for row in rows:
        tracker = Tracker(uri, experiment, f"{sweep.name}/{row.trial}", parent.run_id)
        record_start(tracker, sweep, row.config)
        if row.state != "finished":
            tracker.finish("FAILED")
            continue
        lines = (row.run_dir / "metrics.jsonl").read_text().splitlines()
        seen = set()
        for metrics in map(json.loads, lines):
            if metrics["stage"] != "done":
                record_step(tracker, row.run_dir, {**metrics, **use()}, seen)
        record_end(tracker, sweep, row.run_dir, stored_result(row))
    record_summary(parent, sweep, list(rows), True)
    parent.finish("FINISHED")
    return parent.run_id
