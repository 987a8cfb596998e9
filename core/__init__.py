"""Two-stage differentially private image synthesis: one run, free of Ray and MLflow.

The names in `__all__` are the public ones. Each is loaded when it is asked for: whoever only plans
needs no torch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.config import load
    from core.generation.generator import Generator
    from core.pipeline.single import run
    from core.privacy.plan.plan import make_plan

__all__ = ["Generator", "load", "make_plan", "run"]
_HOMES = {
    "Generator": "core.generation.generator",
    "load": "core.config",
    "make_plan": "core.privacy.plan.plan",
    "run": "core.pipeline.single",
}

# Threads that wait by spinning slow a busy machine down thirtyfold; must be set before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'core' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
