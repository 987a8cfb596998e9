"""A process that trains in a group trains with all of it, or not at all."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from core import distributed


def join(store: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


def test_a_rank_whose_group_is_gone_does_not_go_on_alone(tmp_path):
    ones = torch.ones(1)
    assert distributed.sum_over_ranks(ones) == 1  # No group yet.
    join(tmp_path / "first")
    assert distributed.sum_over_ranks(ones) == 1
    dist.destroy_process_group()  # As a supervisor does, from another thread.
    for collective in (distributed.rank, distributed.world_size):
        with pytest.raises(RuntimeError, match="was ended while it trained"):
            collective()
    with pytest.raises(RuntimeError, match="was ended while it trained"):
        distributed.sum_over_ranks(ones)
    join(tmp_path / "second")
    distributed.leave()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
