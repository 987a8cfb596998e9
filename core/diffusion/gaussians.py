"""Mixtures of Gaussians and their posterior means, from which a denoiser starts in closed form.

For data N(mu, B diag(lambda) B^T + lambda_0 I) the posterior mean given x of noise level sigma is
linear in x: along component i it keeps (lambda_i + lambda_0) / (lambda_i + lambda_0 + sigma^2) of
the distance to mu, and lambda_0 / (lambda_0 + sigma^2) outside. That of a mixture is the mean of
those of its clusters, each weighted with its posterior probability. EDM's preconditioning (Karras
et al. 2022, table 1) is the case of one cluster without components, mu = 0 and lambda_0 =
sigma_data^2.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn

_LEVELS, _LOW, _HIGH = 33, math.log(1e-3), math.log(1e2)
"""Noise levels, evenly spaced by their logarithm, at which the ambiguity is measured."""
_DRAWS = 256


class Gaussians(nn.Module):
    """A mixture of J clusters for each class, and last one Gaussian of all, for "no label".

    All are in [-1, 1] and share the k components `basis`, within which each has axes of its own.
    With D values of an image, the buffers are `center [D]`, `basis [k, D]`, `log_weights
    [C + 1, J]`, `means [C + 1, J, k]`, `axes [C + 1, J, k, k]` (columns), `variances
    [C + 1, J, k]` (lambda), `ambiguity [C + 1, levels]`, see `measure`, and `outside` (lambda_0).

    Args:
        pixels: D.
        components: k.
        num_classes: C.
        clusters: J.
    """

    center: torch.Tensor
    basis: torch.Tensor
    log_weights: torch.Tensor
    means: torch.Tensor
    axes: torch.Tensor
    variances: torch.Tensor
    ambiguity: torch.Tensor
    outside: torch.Tensor

    def __init__(self, pixels: int, components: int, num_classes: int, clusters: int = 1) -> None:
        super().__init__()
        shape = (num_classes + 1, clusters)
        self.register_buffer("center", torch.zeros(pixels))
        self.register_buffer("basis", torch.eye(components, pixels))
        self.register_buffer("log_weights", torch.full(shape, -math.log(clusters)))
        self.register_buffer("means", torch.zeros(*shape, components))
        self.register_buffer("axes", torch.eye(components).repeat(*shape, 1, 1))
        self.register_buffer("variances", torch.zeros(*shape, components))
        self.register_buffer("ambiguity", torch.zeros(num_classes + 1, _LEVELS))
        self.register_buffer("outside", torch.ones(()))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The posterior mean of clean images `[B, C, H, W]`; arguments as those of `Denoiser`."""
        flat, noise = x.flatten(1) - self.center, sigma[:, None] ** 2
        shrunk = self.outside / (self.outside + noise)
        points = flat @ self.basis.T
        weights, means = self._posterior(points, noise, labels)
        inside = torch.einsum("bj,bji->bi", weights, means) - shrunk * points
        return (self.center + shrunk * flat + inside @ self.basis).view_as(x)

    def error(self, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Expected squared error of `forward`, mean over pixels, `[B]`.

        Exact for data with these moments, but for the ambiguity, which is interpolated.
        """
        noise, pixels = sigma**2, len(self.center)
        variances, weights = self.variances[labels] + self.outside, self.log_weights[labels].exp()
        known = (variances * noise[:, None, None] / (variances + noise[:, None, None])).sum(2)
        place = (sigma.log() - _LOW) / (_HIGH - _LOW) * (_LEVELS - 1)
        place = place.clamp(0, _LEVELS - 1)
        below = place.floor().clamp(max=_LEVELS - 2)
        between = torch.stack((1 - (place - below), place - below), dim=1)
        levels = below.long()[:, None] + torch.arange(2, device=below.device)
        inside = (weights * known).sum(1) + (between * self.ambiguity[labels[:, None], levels]).sum(
            1
        )
        outside = self.outside * noise / (self.outside + noise)
        return (inside + (pixels - variances.shape[2]) * outside) / pixels

    def measure(self, generator: torch.Generator) -> None:
        """Measures the ambiguity on draws, once the other buffers are set.

        It is what not knowing the cluster adds to the squared error, summed over the components:
        the posterior mean's mean squared distance from that of the cluster that an image is of.
        """
        classes, clusters = self.log_weights.shape
        if clusters == 1:
            return
        labels = torch.arange(classes).repeat_interleave(_DRAWS)
        for level, log_sigma in enumerate(torch.linspace(_LOW, _HIGH, _LEVELS)):
            own, points = self._drawn(labels, generator)
            noise = torch.exp(2 * log_sigma)
            scale = (self.outside + noise).sqrt()
            points = points + scale * torch.randn(points.shape, generator=generator)
            weights, means = self._posterior(points, noise.view(1, 1), labels)
            apart = torch.einsum("bj,bji->bi", weights, means)
            apart = apart - means[torch.arange(len(own)), own]
            self.ambiguity[:, level] = apart.square().sum(1).view(classes, _DRAWS).mean(1)

    def draw(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Flat images `[B, D]` in the components alone, without the variance `outside`."""
        return self.center + self._drawn(labels, generator)[1] @ self.basis

    def with_outside(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Flat images `[B, D]` of the whole model."""
        drawn = self.draw(labels, generator)
        noise = torch.randn(drawn.shape, generator=generator, device=drawn.device)
        return drawn + self.outside.sqrt() * noise

    def _drawn(
        self, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clusters `[B]` and points in the components `[B, k]`."""
        own = torch.multinomial(self.log_weights[labels].exp(), 1, generator=generator)[:, 0]
        shape = (len(labels), self.means.shape[2])
        drawn = torch.randn(shape, generator=generator, device=self.means.device)
        offsets = drawn * self.variances[labels, own].sqrt()
        return own, self.means[labels, own] + _times(self.axes[labels, own], offsets)

    def _posterior(
        self, points: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the clusters, given noisy points `[B, k]`: weights `[B, J]` and means `[B, J, k]`."""
        weights = points.new_empty((len(labels), self.means.shape[1]))
        means = points.new_empty((*weights.shape, points.shape[1]))
        for own, rows in _groups(labels):
            axes, mean, log_weights = self.axes[own], self.means[own], self.log_weights[own]
            kept = (self.variances[own] + self.outside)[..., None, :]
            wide = kept + noise.expand(len(labels), 1)[rows]
            along = (points[rows] - mean[..., None, :]) @ axes
            logs = log_weights[..., None] - (along.square() / wide + wide.log()).sum(-1) / 2
            found = mean[..., None, :] + (along * (kept / wide)) @ axes.mT
            weights[rows.flatten()] = logs.softmax(-2).transpose(-1, -2).flatten(0, -2)
            means[rows.flatten()] = found.transpose(-2, -3).flatten(0, -3)
        return weights, means


def _groups(labels: torch.Tensor) -> Iterator[tuple[int | torch.Tensor, torch.Tensor]]:
    """Labels, and the rows of a batch that have them, `[1, n]`, or on a GPU `[B, 1, 1]`.

    A class at a time reads its axes once; to tell which there are, a GPU would have to wait, so
    that there each row takes a copy of its own, of J k^2 numbers.
    """
    if labels.device.type != "cpu":
        yield labels, torch.arange(len(labels), device=labels.device)[:, None, None]
        return
    for label in labels.unique().tolist():
        yield label, (labels == label).nonzero().T


def _times(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bij,bj->bi", matrices, vectors)
