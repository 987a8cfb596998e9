"""What a run writes has room, and what cannot be written is one clear error."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from core.config import load
from core.diffusion.denoiser import build_denoiser
from core.diffusion.ema import Ema
from core.errors import StorageError
from core.pipeline.disk_space import needed_bytes, require_space
from core.training.checkpoint import Checkpoints

CONFIG = load("core/configs/digits.yaml")


def test_needed_bytes_cover_what_is_written(tmp_path):
    denoiser = build_denoiser(CONFIG)
    ema, adam = Ema(denoiser, 0.9), torch.optim.Adam(denoiser.parameters())
    for parameter in denoiser.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    state = {"denoiser": denoiser.state_dict(), "ema": ema.state_dict()}
    checkpoints = Checkpoints(tmp_path, "identity")
    checkpoints.save({**state, "optimizer": adam.state_dict()})
    torch.save(ema.module.state_dict(), tmp_path / "model.pt")
    sizes = [path.stat().st_size for path in (checkpoints.path, tmp_path / "model.pt")]
    written = 2 * sizes[0] + sizes[1] + CONFIG.evaluation.num_images * 64
    assert written < needed_bytes(CONFIG) < 3 * written


def test_too_little_space_is_refused(tmp_path, monkeypatch):
    require_space(tmp_path / "new", CONFIG)
    assert not list((tmp_path / "new").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(StorageError, match=r"has 1\.0 MB free, a run needs \d\.\d MB"):
        require_space(tmp_path / "new", CONFIG)


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file' cannot be written .*the same command goes on"):
        Checkpoints(tmp_path / "file", "identity").save({"step": 1})
    with pytest.raises(StorageError, match="cannot be written"):
        require_space(tmp_path / "file" / "below", CONFIG)
