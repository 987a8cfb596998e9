"""Node provider of one machine whose fake nodes have folders of their own, as real nodes have.

In one folder each node would unpack submitted code over that of the others, while it is in use.
"""

import functools
import tempfile
from typing import Any
from unittest import mock

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Provider(FakeMultiNodeProvider):
    """Reads `provider.folder`, below which it makes the nodes' folders."""

    def _create_node_with_resources_and_labels(self, *node: Any) -> None:
        folder = tempfile.mkdtemp(prefix="n", dir=self.provider_config["folder"])
        params = functools.partial(parameter.RayParams, temp_dir=folder)
        with self.lock, mock.patch.object(parameter, "RayParams", params):
            super()._create_node_with_resources_and_labels(*node)
