"""The keeper of the ledgers and workers on another node, each killed at any moment.

This file is also the program that runs on the cluster: `test_keeper.py ACT FOLDER`.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from core.config import load
from core.privacy.ledger.account import Spending
from core.privacy.ledger.ledger import Ledger
from core.privacy.plan.plan import make_plan
from sweep.trials import keeper

STEPS, DATA = 200, "ab" * 32
SETTINGS = {
    "model.base_channels": 8,
    "training.num_steps": STEPS,
    "stage_split": 0.0,
    "privacy.target_epsilon": 1.0,
}
CALLS = ((os, "write"), (os, "fsync"), (os, "replace"), (os, "unlink"))


class Mortal(keeper.Keeper):
    """Kills its own process before so many calls of the system, once; half-way if it writes."""

    def ask(self, account: Spending, question: str, arguments: tuple[Any, ...]) -> keeper.Answer:
        plan = account.folder.parent / "die"
        if plan.exists():
            number, calls = int(plan.read_text()), count()
            plan.unlink()
            write = os.write

            def dying(original: Callable[..., Any]) -> Callable[..., Any]:
                @functools.wraps(original)
                def call(*arguments: Any, **named: Any) -> Any:
                    if next(calls) == number:
                        if original is write:
                            write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*arguments, **named)

                return call

            for module, name in CALLS:
                setattr(module, name, dying(getattr(module, name)))
        return super().ask(account, question, arguments)

    def process(self) -> int:
        """Its number, with the calls of the system as they were before it was to die."""
        return os.getpid()


def spending(folder: Path, run: str) -> Spending:
    config = load("core/configs/digits.yaml", SETTINGS | {"runtime.ledger": str(folder / "ledger")})
    charged = folder / run / "charged"
    return Spending(config, make_plan(config), folder / "ledger", run, folder / run, charged, 1)


class Worker:
    """A worker's dealings with the ledger, in a process that may open no file of it."""

    def __init__(self, folder: str, run: str, asked: Any) -> None:
        self._ledger = os.path.join(folder, "ledger")
        self._account = keeper.KeptAccount(spending(Path(folder), run), keeper.asking(asked))
        self._reservation: Any = None
        sys.addaudithook(self._look)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(self._ledger):
            raise PermissionError(f"a worker opens {arguments[0]}")

    def node(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()

    def reserve(self, resumed: int = 0) -> None:
        self._reservation = self._account.reserve(DATA, "trial", resumed=resumed)

    def train(self, since: int, until: int) -> None:
        for step in range(since, until):
            if self._account.begins_block(step):
                self._account.count(step)

    def commit(self) -> int:
        return self._account.commit(DATA, self._reservation)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Callable[[str, Any], Any]]:
    """A head with the keeper and a node for the workers; gives what starts a worker there."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes.add_node(num_cpus=8, resources={"worker": 8})
    ray.init(address=nodes.address, log_to_driver=False)
    try:
        kind: Any = ray.remote(Worker)

        def start(run: str, asked: Any) -> Any:
            return kind.options(resources={"worker": 1}).remote(str(folder), run, asked)

        yield start
    finally:
        ray.shutdown()
        nodes.shutdown()


def state(folder: Path, run: str) -> tuple[str, int | None]:
    (path,) = (folder / "ledger").glob("*.jsonl")
    entries = Ledger.at(path).summary()["entries"]
    (only,) = [entry for entry in entries if entry["run"] == run]
    return only["state"], only["executed_steps"]


def workers_die(folder: Path) -> None:
    """Between reserve and commit; and one goes on that was taken for dead."""
    import ray

    with cluster(folder) as start:
        asked = keeper.start_keeper()
        first = start("run", asked)
        assert ray.get(first.node.remote()) != ray.get_runtime_context().get_node_id()
        ray.get(first.reserve.remote())
        ray.get(first.train.remote(0, 110))
        ray.kill(first)
        assert state(folder, "run") == ("reserved", None)
        lost, heir = start("run", asked), start("run", asked)
        for worker in (lost, heir):
            ray.get(worker.reserve.remote(100))
        ray.get(heir.train.remote(100, 160))
        for act in (lost.train.remote(100, 130), lost.commit.remote()):
            with pytest.raises(Exception, match="another process has begun"):
                ray.get(act)
        assert state(folder, "run") == ("reserved", None)
        assert ray.get(heir.commit.remote()) == 175
        assert state(folder, "run") == ("committed", 175)


def keeper_stands_still(folder: Path) -> None:
    """No answer comes before the line is on the disk."""
    import ray

    keeper.Keeper = Mortal
    with cluster(folder) as start:
        asked = keeper.start_keeper()
        worker = start("run", asked)
        ray.get(worker.reserve.remote())
        process = ray.get(asked.process.remote())
        for act, after in (
            (lambda: worker.train.remote(0, 20), ("reserved", None)),
            (worker.commit.remote, ("committed", 25)),
        ):
            os.kill(process, signal.SIGSTOP)
            answer = act()
            assert not ray.wait([answer], timeout=3)[0]
            assert state(folder, "run") == ("reserved", None)
            os.kill(process, signal.SIGCONT)
            ray.get(answer)
            assert state(folder, "run") == after


def keeper_dies(folder: Path) -> None:
    """At points of every question, and is started again."""
    import ray

    keeper.Keeper = Mortal
    with cluster(folder) as start:
        asked, deaths = keeper.start_keeper(), dict[str, int]()
        points = range(0, 45, 6)

        def act(name: str, worker: Any, number: int, *arguments: Any) -> Any:
            (folder / "die").write_text(str(number))
            before = ray.get(asked.process.remote())
            answer = ray.get(getattr(worker, name).remote(*arguments))
            after = ray.get(asked.process.remote())
            deaths[name] = deaths.get(name, 0) + (before != after)
            return answer

        for number in points:
            run = f"run{number}"
            worker = start(run, asked)
            act("reserve", worker, number)
            assert state(folder, run) == ("reserved", None)
            act("train", worker, number // 4, 0, 60)
            assert state(folder, run) == ("reserved", None)
            # A death between the charge and the count beside it has all steps count.
            settled = act("commit", worker, number)
            assert settled in (75, STEPS)
            assert state(folder, run) == ("committed", settled)
            ray.kill(worker)
        (folder / "deaths").write_text(json.dumps(deaths))


@pytest.mark.parametrize("act", ["workers_die", "keeper_stands_still", "keeper_dies"])
def test_nothing_counts_short(act, tmp_path):
    environment = os.environ | {
        "FETA_SWEEP_SECRET_FILE": str(tmp_path / "secret"),
        "PYTHONPATH": os.getcwd(),
        "XDG_DATA_HOME": str(tmp_path / "data"),
    }
    done = subprocess.run(
        [sys.executable, __file__, act, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if act == "keeper_dies":
        deaths = json.loads((tmp_path / "deaths").read_text())
        assert min(deaths.values()) >= 3, deaths


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    globals()[sys.argv[1]](Path(sys.argv[2]))
