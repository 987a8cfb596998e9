"""The Frechet distance at the size of Inception's features, as pytorch-fid computes it."""

import pytest
import torch

from core.evaluation.fid import Moments, frechet_distance


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_agrees_with_pytorch_fid_on_2048_features():
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    generator = torch.Generator().manual_seed(0)
    moments = []
    for shift in (0.0, 0.1):
        mixing = torch.randn(2048, 2048, dtype=torch.float64, generator=generator) / 2048**0.5
        noise = torch.randn(2_500, 2048, dtype=torch.float64, generator=generator)
        moments.append(Moments(2048))
        moments[-1].update((noise @ mixing + shift).relu())  # As pooled activations: >= 0.
    arguments = [part.numpy() for m in moments for part in (m.mean, m.covariance)]
    expected = float(fid_score.calculate_frechet_distance(*arguments))
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-3)
