"""Search of central-image count, noise and stage split with Ray Tune, Optuna and Ray Train.

The names in `__all__` are the public ones, each loaded when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sweep.config.sweep import load_sweep
    from sweep.driver.launch import run_sweep

__all__ = ["load_sweep", "run_sweep"]
_HOMES = {"load_sweep": "sweep.config.sweep", "run_sweep": "sweep.driver.launch"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sweep' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
