"""Where a run computes."""

import torch

from core.config import Config


def config_device(config: Config) -> str:
    """The device a run computes on: `auto` takes CUDA where there is one."""
    if config.runtime.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.runtime.device
