"""Use of a trial's machine, under the names that MLflow shows as system metrics."""

from typing import Any

import psutil


class MachineUse:
    """Use of the machine on which the first worker of a trial runs, GPUs included.

    Reported with a trial's steps, so that it needs no process or connection of its own. Processors
    are averaged since the last reading; all else is as it is now. The figures are of the machine,
    whoever uses it.
    """

    def __init__(self) -> None:
        psutil.cpu_percent()  # The first reading has nothing to compare with.
        self._gpus = _gpus()

    def __call__(self) -> dict[str, float]:
        """Percentages in [0, 100], megabytes (10**6) and watts."""
        memory = psutil.virtual_memory()
        use = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
        }
        for number, gpu in enumerate(self._gpus):
            use |= {f"gpu_{number}_{name}": value for name, value in _use_of(gpu).items()}
        return {f"system/{name}": float(value) for name, value in use.items()}


def _gpus() -> list[Any]:
    """Handles of the NVIDIA GPUs; none where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]


def _use_of(gpu: Any) -> dict[str, float]:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
    use = {
        "memory_usage_megabytes": int(memory.used) / 1e6,
        "memory_usage_percentage": 100 * int(memory.used) / int(memory.total),
    }
    try:
        use["utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
        use["power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
    except pynvml.NVMLError:  # Some virtual GPUs, such as a part of a shared one, do not tell.
        pass
    return use
