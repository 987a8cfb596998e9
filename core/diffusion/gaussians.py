"""Class Gaussians and their posterior means, from which a denoiser starts in closed form.

For data N(mu, B diag(lambda) B^T + lambda_0 I) the posterior mean given x of noise level sigma is
linear in x: along component i it keeps (lambda_i + lambda_0) / (lambda_i + lambda_0 + sigma^2) of
the distance to mu, and lambda_0 / (lambda_0 + sigma^2) outside. For other data with these moments
it is the best linear denoiser. EDM's preconditioning (Karras et al. 2022, table 1) is the case
without components, where mu = 0 and lambda_0 = sigma_data^2.
"""

import torch
from torch import nn


class Gaussians(nn.Module):
    """One Gaussian for each class, and last that of all classes together, for "no label".

    All are in [-1, 1] and share the k components `basis`, within which each has axes of its own.
    With D values of an image, the buffers are `center [D]`, `basis [k, D]`, `means [C + 1, k]`,
    `axes [C + 1, k, k]` (columns), `variances [C + 1, k]` (lambda), and two numbers: `outside`
    (lambda_0), and `residual`, the mean variance of real images outside of the components.

    Args:
        pixels: D.
        components: k.
        num_classes: C.
    """

    center: torch.Tensor
    basis: torch.Tensor
    means: torch.Tensor
    axes: torch.Tensor
    variances: torch.Tensor
    outside: torch.Tensor
    residual: torch.Tensor

    def __init__(self, pixels: int, components: int, num_classes: int) -> None:
        super().__init__()
        count = num_classes + 1
        self.register_buffer("center", torch.zeros(pixels))
        self.register_buffer("basis", torch.eye(components, pixels))
        self.register_buffer("means", torch.zeros(count, components))
        self.register_buffer("axes", torch.eye(components).repeat(count, 1, 1))
        self.register_buffer("variances", torch.zeros(count, components))
        self.register_buffer("outside", torch.ones(()))
        self.register_buffer("residual", torch.ones(()))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The posterior mean of clean images `[B, C, H, W]`; arguments as those of `Denoiser`."""
        flat, mean, noise = x.flatten(1) - self.center, self.means[labels], sigma[:, None] ** 2
        shrunk = self.outside / (self.outside + noise)
        variances, axes = self.variances[labels] + self.outside, self.axes[labels]
        along = torch.einsum("bi,bij->bj", flat @ self.basis.T - mean, axes)
        along = along * (variances / (variances + noise) - shrunk)
        inside = (1 - shrunk) * mean + torch.einsum("bj,bij->bi", along, axes)
        return (self.center + shrunk * flat + inside @ self.basis).view_as(x)

    def error(self, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Expected squared error of `forward`, mean over pixels, `[B]`.

        Exact for data with these moments whose variance outside of the components is `residual`.
        """
        noise, pixels = sigma**2, len(self.center)
        variances = self.variances[labels] + self.outside
        inside = (variances * noise[:, None] / (variances + noise[:, None])).sum(1)
        kept = self.outside / (self.outside + noise)
        outside = (1 - kept) ** 2 * self.residual + kept**2 * noise
        return (inside + (pixels - variances.shape[1]) * outside) / pixels

    def draw(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Flat images `[B, D]` in the components alone, without the variance `outside`."""
        shape = (len(labels), self.means.shape[1])
        drawn = torch.randn(shape, generator=generator, device=self.means.device)
        return self.along(labels, drawn)

    def along(self, labels: torch.Tensor, deviations: torch.Tensor) -> torch.Tensor:
        """Flat images `[B, D]`, so many standard deviations `[B, k]` from the mean on each axis."""
        offsets = deviations * self.variances[labels].sqrt()
        inside = self.means[labels] + torch.einsum("bj,bij->bi", offsets, self.axes[labels])
        return self.center + inside @ self.basis
