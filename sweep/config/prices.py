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
    """USD per hour of a cloud's machines.

    Attributes:
        machine: of a worker; it has one GPU.
        head: of the machine that holds the trials, which runs as long as the sweep.
        date: of the figures.
    """

    machine: str
    on_demand: float
    spot: float
    head: float
    date: str

    def of(self, gpu_hours: float, head_hours: float, spot: bool = False) -> float:
        """USD of so many hours of GPUs and of the head."""
        return gpu_hours * (self.spot if spot else self.on_demand) + head_hours * self.head


def price_of(cloud: Cloud) -> Price:
    """The prices of a cloud.

    Raises:
        ConfigError: the table is missing or damaged.
    """
    table = load_yaml(_TABLE)["prices"][cloud]
    gpu = table["gpu"]
    return Price(
        gpu["machine"],
        gpu["on_demand"],
        gpu["spot"],
        table["head"]["on_demand"],
        str(table["date"]),
    )
