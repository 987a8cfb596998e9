"""Node providers that start an on-demand machine where no spot machine is available.

Ray's autoscaler asks for the same node type again whenever a launch fails, so a second, on-demand
node type would never get its turn while spot capacity is short. Here the launch itself falls back:
a launcher file names `clusters.spot.AWS` or `clusters.spot.GCP` as the module of an `external`
provider. Each is Ray's own provider of that cloud but for this one method.
"""

import importlib
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)
NodeConfig = dict[str, Any]


def _aws_on_demand(config: NodeConfig) -> NodeConfig:
    return {key: value for key, value in config.items() if key != "InstanceMarketOptions"}


def _gcp_on_demand(config: NodeConfig) -> NodeConfig:
    spot = ("provisioningModel", "instanceTerminationAction")
    scheduling = {k: v for k, v in config.get("scheduling", {}).items() if k not in spot}
    return {**config, "scheduling": scheduling} if scheduling else config


_CLOUDS: dict[str, tuple[str, str, Callable[[NodeConfig], NodeConfig]]] = {
    "AWS": ("aws.node_provider", "AWSNodeProvider", _aws_on_demand),
    "GCP": ("gcp.node_provider", "GCPNodeProvider", _gcp_on_demand),
}


def with_fallback(provider: type, on_demand: Callable[[NodeConfig], NodeConfig]) -> type:
    """Derives a provider that retries a failed launch of a spot machine on demand.

    Args:
        provider: one of Ray's node providers.
        on_demand: turns the configuration of a spot node into that of an on-demand node, and
            leaves any other as it is.
    """

    class SpotFirst(provider):
        def create_node(self, node_config: NodeConfig, tags: dict[str, str], count: int) -> Any:
            fallback = on_demand(node_config)
            created: dict[str, Any] = {}
            # One by one: of several asked for at once some may exist when the launch fails.
            for _ in range(count):
                try:
                    made = super().create_node(node_config, tags, 1)
                except Exception as error:
                    if fallback == node_config:
                        raise
                    logger.warning("no spot machine (%s): starting one on demand", error)
                    made = super().create_node(fallback, tags, 1)
                created.update(made or {})
            return created

    return SpotFirst


def __getattr__(name: str) -> type:
    """Builds a cloud's provider on first use, as each needs an SDK that the others lack."""
    if name not in _CLOUDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, provider, on_demand = _CLOUDS[name]
    base = getattr(importlib.import_module(f"ray.autoscaler._private.{module}"), provider)
    globals()[name] = with_fallback(base, on_demand)
    return globals()[name]
