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
_PROOF, _PATIENCE = 2, 100
"""Steps in a row without a shortage after which a size is kept, and twice the size is tried."""
_FULL = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",
)
"""How drivers, cuBLAS and cuDNN, which found no room for a workspace, say that memory is full."""


class PhysicalBatches:
    """Splits what a rank computes in a step into parts that fit into memory.

    `private_training.max_physical_batch_size` is the size, or `auto`: then the first attempt is
    halved whenever memory runs out. As the shortage may be another's, larger parts are tried again
    later; a size that sufficed for whole steps is kept in `runtime.cache` for this device and all
    settings that memory depends on.

    Args:
        config: of the run.
        device: `cpu` or `cuda`.

    Attributes:
        size: most images in a part.
    """

    def __init__(self, config: Config, device: str) -> None:
        setting = config.private_training.max_physical_batch_size
        self._path: Path | None = None
        self._steps = 0
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
        self._most = _FIRST[device]
        self.size = self._kept = _remembered(self._path) or self._most

    def run(
        self,
        compute: Callable[[torch.Tensor], Result],
        ids: torch.Tensor,
        give_up: Callable[[], None],
    ) -> Iterator[Result]:
        """Yields `compute(part)` for consecutive parts of `ids`, int64 `[N]`, N >= 0.

        Args:
            compute: must leave no trace of a part for which it runs out of memory, but for what
                `give_up` removes.

        Raises:
            RuntimeError: memory is full, as torch says it, and the size was given or not even one
                image fits.
        """
        start, largest = 0, 0
        while start < len(ids):
            part = ids[start : start + self.size]
            try:
                result = compute(part)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                give_up()
                if self._path is None or len(part) == 1:
                    raise
            else:
                yield result
                start, largest = start + len(part), max(largest, len(part))
                continue
            torch.cuda.empty_cache()  # Not in the handler, whose traceback still holds tensors.
            self.size, self._steps = max(1, self.size // 2), -1
        self._count(largest)

    def _count(self, largest: int) -> None:
        """Counts a step that ended, whose largest part had so many images."""
        if self._path is None or largest < self.size:  # Which proves nothing.
            return
        self._steps += 1
        if self._steps == _PROOF and self.size != self._kept:
            self._kept = self.size
            write_whole(self._path, json.dumps({"size": self.size}), private=True, by_many=True)
        if self._steps >= _PATIENCE and self.size < self._most:
            self.size, self._steps = min(2 * self.size, self._most), 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether that is what torch, or a library that it calls, means by an error."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _FULL)


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
