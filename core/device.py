"""Device of a run."""

import os
import platform

import torch

from core.config import Config


def config_device(config: Config) -> str:
    """The device a run computes on: `auto` takes CUDA where there is one."""
    if config.runtime.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.runtime.device


def device_name(config: Config) -> str:
    """What that device is called, so that times compare."""
    if config_device(config) == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"
