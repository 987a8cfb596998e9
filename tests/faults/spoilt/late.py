"""Changes a module just after it was loaded, in whichever process loads it."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType


class Late(importlib.abc.MetaPathFinder):
    """Calls `spoil` with the module `name` once it is loaded."""

    def __init__(self, name: str, spoil: Callable[[ModuleType], None]) -> None:
        self._name, self._spoil = name, spoil
        sys.meta_path.insert(0, self)

    def find_spec(self, name, path, target=None):
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_spoil(module):
            load(module)
            self._spoil(module)

        spec.loader.exec_module = load_and_spoil
        return spec
