"""A run by itself, which no sweep counts: `core.run`, and `python -m core run`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import Config, load, nested, short_digest
from core.config.metrics import DIRECTIONS
from core.io.files import local_folder
from core.io.terminal import Console
from core.pipeline.run import run as run_pipeline
from core.privacy.keys import MasterSecret
from core.record.folder import RunFolder


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: all that it wrote; `folder.plan()` is its privacy plan.
        report: what it reported last: scores, epsilons, noise multiplier and seconds.
    """

    folder: RunFolder
    report: dict[str, Any]

    @property
    def scores(self) -> dict[str, float]:
        """Scores by name; accuracy, precision and recall in [0, 1].

        Privacy: `folder.result().tags` says of each how private it is.
        """
        return {name: self.report[name] for name in DIRECTIONS if name in self.report}


def run(config: Config, run_dir: str | Path | None = None, verbosity: int = 0) -> Outcome:
    """Trains, generates and scores one model in this process, as `python -m core run` does.

    The same call goes on with an interrupted run, and shows a finished one.

    Args:
        config: as of `load`.
        run_dir: folder of the run, by whose name the ledger knows it; if not given, `runs/DATASET`
            with a digest of the configuration.
        verbosity: of the progress on the terminal: -1 none, 0 a line, 1 a line for each report.

    Raises:
        ConfigError: a value is out of range; or as of `core.pipeline.run.run`.
        UserError: as of `core.pipeline.run.run`.

    Privacy: the ledger reserves the whole plan before the data is opened.
    """
    config = load(nested(config))  # A copy with other values is checked as a file is.
    default = f"runs/{config.dataset.name}-{short_digest(config)}"
    folder = RunFolder(Path(local_folder("run_dir", str(run_dir or default))))
    console, name = Console(config.training.num_steps, verbosity), folder.path.name
    master = MasterSecret.load()
    report = run_pipeline(config, folder.path, master=master, name=name, report=console)
    return Outcome(folder, report)
