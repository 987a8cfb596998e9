"""A sweep that lies on disk, recorded in MLflow by the mirror that a real one has."""

import json
from collections.abc import Sequence

from core.io.files import to_json
from sweep.config.sweep import SweepConfig
from sweep.results.table import Row, released_row, write_card
from sweep.tracking.client import Tracker, open_experiment
from sweep.tracking.mirror import Mirror
from sweep.trials.machine import MachineUse


def record(sweep: SweepConfig, rows: Sequence[Row], uri: str) -> str:
    """Tells all that the trials' folders hold; returns the parent's run id."""
    experiment = open_experiment(uri, sweep.experiment, sweep.folder.parent)
    use = MachineUse()
    for path in (row.run_dir / "metrics.jsonl" for row in rows if row.state == "finished"):
        lines = [{**json.loads(line), **use()} for line in path.read_text().splitlines()]
        path.write_text("".join(to_json(line) + "\n" for line in lines))
    mirror = Mirror(sweep, 0, uri, len(rows))
    released = released_row(sweep, rows)
    assert released is not None
    mirror.summarize(rows, write_card(sweep, rows, released, True))
    mirror.begin(rows)
    assert mirror.close(60, "FINISHED") == 0
    return Tracker(uri, experiment, sweep.name).run_id
