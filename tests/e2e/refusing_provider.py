"""Node provider of a cloud whose quota is nought."""

from typing import Any

from clusters.local import own_folders

REASON = "VcpuLimitExceeded: you asked for more vCPUs than your limit of 0"


class Provider(own_folders.Provider):
    """Refuses every node."""

    def _create_node_with_resources_and_labels(self, *node: Any) -> None:
        raise RuntimeError(REASON)
