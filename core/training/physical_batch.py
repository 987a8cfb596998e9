"""Physical batch size: given, or found by halving until memory suffices."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from core.config import Config, flatten
from core.io.files import write_whole

Result = TypeVar("Result")

_FIRST = {"cuda": 1024, "cpu": 64}
"""First attempt: what no device gains from exceeding. A CPU's memory may be exhausted without an
exception, so that its first attempt must be modest."""


class PhysicalBatches:
    """Splits what a rank computes in a step into parts that fit into memory.

    `private_training.max_physical_batch_size` is the size, or `auto`: then the first attempt is
    halved whenever memory runs out, and the size that sufficed is kept in `runtime.cache` for
    this device and all settings that memory depends on.

    Args:
        config: of the run.
        device: `cpu` or `cuda`.

    Attributes:
        size: most images in a part.
    """

    def __init__(self, config: Config, device: str) -> None:
        setting = config.private_training.max_physical_batch_size
        self._path: Path | None = None
        if setting != "auto":
            self.size = setting
            return
        settings = {
            key: value
            for key, value in flatten(config).items()
            if key.startswith(("model.", "dataset.image_size", "dataset.channels"))
            or key in ("private_training.noise_multiplicity", "training.precision")
        }
        origin = [_name(device), settings]
        digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
        self._path = Path(config.runtime.cache) / f"physical_batch-{digest[:16]}.json"
        self.size = _remembered(self._path) or _FIRST[device]

    def run(
        self,
        compute: Callable[[torch.Tensor], Result],
        ids: torch.Tensor,
        give_up: Callable[[], None],
    ) -> Iterator[Result]:
        """Yields `compute(part)` for consecutive parts of `ids`, int64 `[N]`, N >= 0.

        Args:
            compute: must leave no trace of a part for which it raises `torch.OutOfMemoryError`,
                but for what `give_up` removes.

        Raises:
            torch.OutOfMemoryError: the size was given, or not even one image fits.
        """
        start = 0
        while start < len(ids):
            part = ids[start : start + self.size]
            try:
                result = compute(part)
            except torch.OutOfMemoryError:
                give_up()
                if self._path is None or len(part) == 1:
                    raise
                result = None
            if result is None:  # Not in the handler, where the traceback still holds tensors.
                torch.cuda.empty_cache()
                self.size = len(part) // 2
                self._remember()
                continue
            yield result
            start += len(part)

    def _remember(self) -> None:
        assert self._path is not None
        write_whole(self._path, json.dumps({"size": self.size}), private=True, by_many=True)


def _name(device: str) -> list[object]:
    """The model of a device and its memory in bytes."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return [properties.name, properties.total_memory]
    return [device]


def _remembered(path: Path) -> int | None:
    try:
        size = json.loads(path.read_text())["size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # Damaged files are found anew.
    return size if isinstance(size, int) and size >= 1 else None
