"""KID, precision and recall against closed forms and plain loops over all pairs."""

import math

import pytest
import torch

from core.errors import DataError
from core.evaluation import kid
from core.evaluation.kid import kernel_distance
from core.evaluation.precision_recall import precision_and_recall


def _normal(count: int, dimension: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


def _loops(x: torch.Tensor, y: torch.Tensor) -> float:
    """Equation 4 of Binkowski et al. (2018), pair by pair."""
    a, b, d = x.tolist(), y.tolist(), x.shape[1]

    def k(u: list[float], v: list[float]) -> float:
        return (sum(p * q for p, q in zip(u, v, strict=True)) / d + 1) ** 3

    n = len(a)
    within = sum(k(s[i], s[j]) for s in (a, b) for i in range(n) for j in range(n) if i != j)
    across = sum(k(u, v) for u in a for v in b)
    return within / (n * (n - 1)) - 2 * across / n**2


def test_one_subset_is_the_sum_over_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _normal(18, 5, 0), _normal(16, 5, 1) + 0.5
    monkeypatch.setattr(kid, "SUBSETS", 2)
    generator = torch.Generator().manual_seed(7)
    expected = []
    for _ in range(2):  # Half of the smaller side.
        chosen = [side[torch.randperm(len(side), generator=generator)[:8]] for side in (x, y)]
        expected.append(_loops(*chosen))
    mean, deviation = kernel_distance(x, y, torch.Generator().manual_seed(7))
    assert mean == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert deviation == pytest.approx(abs(expected[0] - expected[1]) / math.sqrt(2), rel=1e-5)


def test_it_is_unbiased_at_any_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one dimension with x = 0 and y = c the moments give (c^2 + 1)^3 + 1 - 2 exactly."""
    zero, shifted = torch.zeros(20, 1), torch.full((20, 1), 2.0)
    mean, deviation = kernel_distance(zero, shifted, torch.Generator())
    assert mean == pytest.approx((2.0**2 + 1) ** 3 - 1)
    assert deviation == pytest.approx(0, abs=1e-9)
    monkeypatch.setattr(kid, "SUBSETS", 8)
    for count in (60, 600):  # A biased estimate would be above 0 by about 30 / count.
        values = [
            kernel_distance(_normal(count, 4, 2 * i), _normal(count, 4, 2 * i + 1), _seeded(i))[0]
            for i in range(12)
        ]
        error = torch.tensor(values).std().item() / math.sqrt(len(values))
        assert abs(sum(values) / len(values)) < 5 * error
        assert min(values) < 0 < max(values)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_grows_with_the_difference_and_is_symmetric() -> None:
    x, y = _normal(400, 8, 0), _normal(400, 8, 1)
    near, far = (kernel_distance(x, y + shift, _seeded(0))[0] for shift in (0.2, 1.0))
    assert abs(kernel_distance(x, y, _seeded(0))[0]) < near < far
    back = kernel_distance(y + 1.0, x, _seeded(0))[0]
    assert back == pytest.approx(far, rel=0.1)


def _covered_by_loops(points: list[list[float]], centers: list[list[float]]) -> float:
    def distance(u: list[float], v: list[float]) -> float:
        return math.dist(u, v)

    radii = [
        sorted(distance(c, other) for j, other in enumerate(centers) if j != i)[2]
        for i, c in enumerate(centers)
    ]
    inside = [any(distance(p, c) <= r for c, r in zip(centers, radii, strict=True)) for p in points]
    return sum(inside) / len(points)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_precision_and_recall_are_those_of_plain_loops(shift: float) -> None:
    real, synthetic = _normal(70, 3, 0), _normal(50, 3, 1) * 0.7 + shift
    precision, recall = precision_and_recall(real, synthetic)
    assert precision == pytest.approx(_covered_by_loops(synthetic.tolist(), real.tolist()))
    assert recall == pytest.approx(_covered_by_loops(real.tolist(), synthetic.tolist()))
    assert 0 <= recall < 1 or shift == 0


def test_blocks_do_not_change_precision_and_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    real, synthetic = _normal(70, 3, 0), _normal(50, 3, 1) + 0.5
    whole = precision_and_recall(real, synthetic)
    monkeypatch.setattr("core.evaluation.precision_recall._BLOCK", 7)
    assert precision_and_recall(real, synthetic) == whole


def test_few_modes_are_precise_but_cover_little() -> None:
    clusters = torch.eye(4) * 100
    real = (clusters[:, None] + _normal(40, 4, 0).view(4, 10, 4)).flatten(0, 1)
    one_mode = clusters[0] + _normal(40, 4, 1) * 0.1
    precision, recall = precision_and_recall(real, one_mode)
    assert precision > 0.9
    assert recall <= 0.25
    assert precision_and_recall(real, real) == (1.0, 1.0)
    assert precision_and_recall(real, real + 1e4) == (0.0, 0.0)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(DataError, match="at least 4 images"):
        kernel_distance(_normal(3, 2, 0), _normal(9, 2, 0), torch.Generator())
    with pytest.raises(DataError, match="more than 3 images"):
        precision_and_recall(_normal(9, 2, 0), _normal(3, 2, 0))
