"""Frechet distance between two sets of images, from float64 moments of their features."""

import math
from collections.abc import Mapping
from typing import Any

import torch


class Moments:
    """Mean and covariance of features that arrive in batches, in float64.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1983), which does not
    cancel when the mean is large against the spread.

    Attributes:
        count: number of feature vectors seen.
        mean: float64 `[D]`.
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)
        self._root: torch.Tensor | None = None

    def update(self, features: torch.Tensor) -> None:
        """Adds features `[B, D]`, B >= 0.

        Raises:
            ValueError: the features are not `[B, D]` or not all finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(
                f"features have shape {list(features.shape)}, not [B, {len(self.mean)}]"
            )
        if not len(features):
            return
        features = features.detach().to(self.mean)
        if not features.isfinite().all():
            raise ValueError("features hold NaN or infinite values")
        self._root, total = None, self.count + len(features)
        mean = features.mean(dim=0)
        centered, shift = features - mean, mean - self.mean
        self._scatter += centered.T @ centered
        self._scatter += torch.outer(shift, shift) * (self.count * len(features) / total)
        self.mean = self.mean + shift * (len(features) / total)
        self.count = total

    def state_dict(self) -> dict[str, torch.Tensor | int]:
        """What `restored` needs, the root included; raises as `scatter`."""
        return {
            "count": self.count,
            "mean": self.mean,
            "scatter": self.scatter,
            "root": self.root,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "Moments":
        """The moments whose `state_dict` was kept, on the device where that lies."""
        moments = cls(len(state["mean"]), state["mean"].device)
        moments.count, moments.mean = state["count"], state["mean"]
        moments._scatter, moments._root = state["scatter"], state["root"]
        return moments

    @property
    def scatter(self) -> torch.Tensor:
        """The unbiased covariance times `count - 1`, float64 `[D, D]`.

        Raises:
            ValueError: fewer than two feature vectors were seen.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, not {self.count}")
        return self._scatter

    @property
    def root(self) -> torch.Tensor:
        """An A with A A^T = `scatter`, kept until the next update and by `state_dict`.

        The Cholesky factor or, of a singular matrix (there are fewer images than features), the
        symmetric root; raises as `scatter`.
        """
        if self._root is not None:
            return self._root
        root, failed = torch.linalg.cholesky_ex(self.scatter)
        if failed:
            values, vectors = torch.linalg.eigh(self.scatter)
            root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        self._root = root
        return root

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased covariance, float64 `[D, D]`; raises as `scatter`."""
        return self.scatter / (self.count - 1)


def frechet_distance(m1: Moments, m2: Moments) -> float:
    """Squared Frechet distance of the Gaussians with these moments, >= 0; `m2` of the real images.

    d^2 = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): Dowson and Landau (1982);
    Heusel et al. (2017), equation 6. With any A of A A^T = S2, S1 S2 and A^T S1 A have the same
    eigenvalues, so that the trace needs those of one symmetric matrix.

    Raises:
        ValueError: the moments differ in dimension, or one has fewer than two feature vectors.
    """
    if m1.mean.shape != m2.mean.shape:
        raise ValueError(f"moments differ in dimension: {len(m1.mean)} and {len(m2.mean)}")
    # Of the scatters, not of the covariances: a factor for the trace in place of two matrices.
    device = m2.mean.device
    s1, s2 = m1.scatter.to(device), m2.scatter
    # One triangle is read, so rounding need not be made symmetric; this one is LAPACK's faster.
    product = (m2.root.T @ (s1 @ m2.root)).mT
    trace = torch.linalg.eigvalsh(product, UPLO="U").clamp_(min=0).sqrt_().sum().item()
    n1, n2 = m1.count - 1, m2.count - 1
    shift = m1.mean.to(device) - m2.mean
    spread = s1.trace().item() / n1 + s2.trace().item() / n2 - 2 * trace / math.sqrt(n1 * n2)
    return max(shift.dot(shift).item() + spread, 0.0)
