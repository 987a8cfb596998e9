"""Prices of the launcher files' machines, from `clusters/prices.yaml`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.config import load_yaml

Cloud = Literal["aws", "gcp"]
CLOUDS: tuple[Cloud, ...] = ("aws", "gcp")
_TABLE = Path(__file__).resolve().parents[2] / "clusters" / "prices.yaml"


@dataclass(frozen=True)
class Price:
    """What a cloud charges, in USD per hour of a machine with its disk.

    Attributes:
        machine: of a worker; it has one GPU.
        head: of the machine that holds the trials, and of any other without a GPU.
        folder: service of the folder that all nodes see.
        folder_month, folder_gb_month: of that folder, a month, and a month and GB (10**9 bytes).
        start, idle: minutes for which a worker is paid before and after its work.
        head_idle: minutes for which the head is paid after the last job.
        date: of the figures.
    """

    machine: str
    on_demand: float
    spot: float
    head: float
    folder: str
    folder_month: float
    folder_gb_month: float
    start: float
    idle: float
    head_idle: float
    date: str

    def of(self, gpu_hours: float, plain_hours: float, spot: bool = False) -> float:
        """USD of so many hours of GPUs, and of machines without one."""
        return gpu_hours * (self.spot if spot else self.on_demand) + plain_hours * self.head


def price_of(cloud: Cloud) -> Price:
    """The prices of a cloud.

    Raises:
        ConfigError: the table is missing or damaged.
    """
    content = load_yaml(_TABLE)
    table = content["prices"][cloud]
    gpu, folder, disk = table["gpu"], table["folder"], table["disk"]
    return Price(
        machine=gpu["machine"],
        on_demand=gpu["on_demand"] + disk,
        spot=gpu["spot"] + disk,
        head=table["head"]["on_demand"] + disk,
        folder=folder["service"],
        folder_month=folder["month"],
        folder_gb_month=folder["gb_month"],
        date=str(table["date"]),
        **content["minutes"],
    )
