"""Choices of training that are off by default: a stopped run ends as an undisturbed one."""

import argparse

import numpy as np
import pytest
import torch
from two_ranks import tiny_run

from core.__main__ import main
from core.commands.run import evaluate

OPTIONS = {
    "training.num_steps": 12,
    "training.posthoc_ema": True,
    "private_training.optimizer": "adam_bc",
    "central_images.max_norm": 2.0,
    "runtime.checkpoint_every": 2,
    "runtime.log_every": 1,
}


def test_a_stopped_run_ends_alike_and_can_be_averaged_afterwards(tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    tiny_run(whole, **OPTIONS)

    def stop(report: dict) -> None:
        if report["step"] == 9:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        tiny_run(stopped, stop, **OPTIONS)
    tiny_run(stopped, **OPTIONS)
    model = torch.load(whole / "model.pt", weights_only=True)
    again = torch.load(stopped / "model.pt", weights_only=True)
    assert all(torch.equal(model[name], again[name]) for name in model)
    snapshots = sorted((whole / "posthoc_ema").iterdir())
    assert len(snapshots) == 12
    for path in snapshots:
        other = torch.load(stopped / "posthoc_ema" / path.name, weights_only=True)
        assert torch.equal(torch.load(path, weights_only=True), other)

    images = []
    for length in ("0.05", "0.2"):
        out = tmp_path / f"{length}.npz"
        command = ["generate", "--run-dir", str(whole), "--num-images", "20", "--out", str(out)]
        assert main([*command, "--ema-length", length]) == 0
        images.append(np.load(out)["images"])
    assert (images[0] != images[1]).any()
    capsys.readouterr()
    evaluate(argparse.Namespace(run_dir=whole, overrides=[], ema_length=0.1))
    assert "accuracy" in capsys.readouterr().out
