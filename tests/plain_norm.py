"""What `norm_kernel` computes, in plain torch; and two mistakes that a kernel could make."""

import torch
import torch.nn.functional as F

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> Tensors:
    (count, channels), positions = x.shape[:2], x[0, 0].numel()
    out, means, deviations = torch.native_group_norm(
        x.float().contiguous(), weight, bias, count, channels, positions, groups, eps
    )
    out = F.silu(out) if silu else out
    return out.to(x.dtype).contiguous(memory_format=torch.channels_last), means, deviations


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    means: torch.Tensor,
    deviations: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    silu: bool,
) -> Tensors:
    groups = means.shape[1]

    def in_groups(values: torch.Tensor) -> torch.Tensor:
        return values.float().reshape(len(values), groups, -1)

    def of_groups(values: torch.Tensor) -> torch.Tensor:
        return in_groups(values).mean(2, keepdim=True).expand(-1, -1, in_groups(x).shape[2])

    scale, shift = weight.view(-1, 1, 1), bias.view(-1, 1, 1)
    value = ((in_groups(x) - means[..., None]) * deviations[..., None]).view(x.shape)
    gradient = grad.float()
    if silu:
        given = value * scale + shift
        gradient = gradient * given.sigmoid() * (1 + given * (1 - given.sigmoid()))
    inner = of_groups(gradient * scale) + in_groups(value) * of_groups(gradient * scale * value)
    grad_x = ((in_groups(gradient * scale) - inner) * deviations[..., None]).view(x.shape)
    grad_x = grad_x.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return grad_x, (gradient * value).sum((2, 3)), gradient.sum((2, 3))


def of_another_group(*arguments: object) -> Tensors:
    out, means, deviations = forward(*arguments)  # type: ignore[arg-type]
    return out, means.roll(1, 1), deviations.roll(1, 1)


def over_the_batch(*arguments: object) -> Tensors:
    grad_x, *sums = backward(*arguments)  # type: ignore[arg-type]
    of_scale, of_shift = (each.sum(0).expand_as(each) for each in sums)
    return grad_x, of_scale, of_shift
