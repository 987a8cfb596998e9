"""Keeper of a sweep's ledgers: one process beside the driver writes them, workers ask it.

So no lock has to hold between machines, and the ledgers may lie on the head's own disk.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from core.errors import LedgerError, UserError
from core.privacy.ledger.account import Spending
from core.privacy.ledger.ledger import Reservation

Answer = tuple[Any, Spending, list[str]]
"""What a question returns, or the user's error that it raises; the account after it; what was
logged."""
Ask = Callable[[Spending, str, tuple[Any, ...]], Answer]
_LOG = logging.getLogger("core")
_PATIENCE_S = 1800.0
"""Seconds to wait for an answer: twice as long as the ledger's own lock is waited for."""
_RETRIES = 3
"""Times that a question is asked again of a keeper that died over it."""


class Keeper:
    """Does beside the ledgers what runs ask of their accounts, one question after the other.

    It remembers nothing but what lies on the disk. One that died is started again, and a question
    that is asked again finds what was done for it.
    """

    def ask(self, account: Spending, question: str, arguments: tuple[Any, ...]) -> Answer:
        """What the method `question` of the account returns, when that has reached the disk."""
        logged = _Logged()
        _LOG.addHandler(logged)
        try:
            answer = getattr(account, question)(*arguments)
        except UserError as error:
            answer = error
        finally:
            _LOG.removeHandler(logged)
        return answer, account, logged.lines


class _Logged(logging.Handler):
    """Warnings, which belong into the log of the run that asks."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@dataclass
class KeptAccount:
    """A run's account, of which everything that reads or writes a file is done by the keeper.

    See `core.privacy.ledger.account.Account`.
    """

    account: Spending
    ask: Ask

    def known_fingerprint(self) -> str | None:
        """Fingerprint that this source had when a run opened it last."""
        return self._asked("known_fingerprint")

    def reserve(
        self, fingerprint: str, identity: str, central: str = "", resumed: int = 0
    ) -> Reservation:
        """Charges the whole plan, or finds that this run has done so before."""
        return self._asked("reserve", fingerprint, identity, central, resumed)

    def begins_block(self, step: int) -> bool:
        """Whether `count` must be called before this step: the same on all ranks."""
        return self.account.begins_block(step)

    def count(self, step: int) -> None:
        """Notes that a step is about to begin."""
        self._asked("count", step)

    def commit(self, fingerprint: str, reservation: Reservation) -> int:
        """Settles all steps that ever began; returns how many."""
        return self._asked("commit", fingerprint, reservation)

    def remember(self, fingerprint: str) -> None:
        """Notes the source's fingerprint."""
        self._asked("remember", fingerprint)

    def _asked(self, question: str, *arguments: Any) -> Any:
        answer, self.account, lines = self.ask(self.account, question, arguments)
        for line in lines:
            _LOG.warning("%s", line)
        if isinstance(answer, UserError):
            raise answer
        return answer


def start_keeper() -> Any:
    """Starts the actor beside the driver, where the ledgers lie."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Keeper)
    return actor.options(
        num_cpus=0, max_restarts=-1, max_task_retries=_RETRIES, scheduling_strategy=here
    ).remote()


def asking(keeper: Any) -> Ask:
    """Asks the actor, from any process of the cluster.

    Raises:
        LedgerError: it does not answer.
    """

    def ask(account: Spending, question: str, arguments: tuple[Any, ...]) -> Answer:
        try:
            return ray.get(keeper.ask.remote(account, question, arguments), timeout=_PATIENCE_S)
        except GetTimeoutError:
            raise LedgerError(
                f"the process that keeps the ledger '{account.folder}' beside the driver gave no "
                f"answer in {_PATIENCE_S:g} s: look there what holds that folder; what is reserved "
                "stays reserved, and the same command goes on"
            ) from None

    return ask
