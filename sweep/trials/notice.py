"""Notice upon which a trial keeps its state at once: a machine will go, or the sweep stops."""

import time
from collections.abc import Callable, Iterable

_EVERY_S = 2.0
"""Seconds between two questions."""
_SPACE = "feta-sweep"


def ask_to_keep(sweep: str, launch: int) -> None:
    """Asks the trials of a driver to keep their state."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(f"{sweep}/{launch}", "stops", namespace=_SPACE)


class Notice:
    """Whether a run must keep its state now; true once for each machine, and once for a stop.

    Training goes on until its processes are ended.

    Args:
        sweep, launch: as of `ask_to_keep`.
        nodes: Ray's ids of the machines that matter.
        in_danger: told first that one of them will go.
        kept: told when the state was kept for a stop.
    """

    def __init__(
        self,
        sweep: str,
        launch: int,
        nodes: Iterable[str],
        in_danger: Callable[[], None],
        kept: Callable[[], None],
    ) -> None:
        self._key, self._nodes = f"{sweep}/{launch}", {*nodes}
        self._in_danger, self._kept = in_danger, kept
        self._asked, self._stops, self._keeps = 0.0, False, False

    def __call__(self) -> bool:
        """Asks the cluster now and then."""
        from ray._private.state import state
        from ray.experimental.internal_kv import _internal_kv_exists

        if self._keeps:  # Since the last call.
            self._keeps = False
            self._kept()
        if (now := time.monotonic()) - self._asked < _EVERY_S:
            return False
        self._asked = now
        try:
            lost = self._nodes & {*state.get_draining_nodes()}
            self._keeps = not self._stops and _internal_kv_exists(self._key, namespace=_SPACE)
        except Exception:  # A busy cluster: the next call asks again.
            return False
        self._stops |= self._keeps
        self._nodes -= lost
        if lost:
            self._in_danger()
        return bool(lost) or self._keeps
