"""Poisson subsampling: one global mask a step, drawn from a secret stream, equal on all ranks."""

import numpy as np
import torch

from core.privacy.keys import KeyedStream


class PoissonSampler:
    """Includes each of N examples independently with probability q at each step.

    The batch that results has any size, zero included: it is never resampled, topped up or cut,
    as the amplification theorem holds for nothing else.

    Privacy: the stream must be secret; who knows a mask gets no amplification.
    """

    def __init__(self, stream: KeyedStream, num_examples: int, sample_rate: float) -> None:
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate={sample_rate} must lie in (0, 1]")
        self._stream = stream
        self._num_examples = num_examples
        # Exact integer comparison; q is off by at most 2**-64.
        self._threshold = int(sample_rate * 2.0**64)

    def indices(self, step: int) -> torch.Tensor:
        """Indices of the examples in the batch of `step`, ascending int64 `[batch]`."""
        if self._threshold >= 2**64:
            return torch.arange(self._num_examples)
        mask = self._stream.bits(step, self._num_examples) < np.uint64(self._threshold)
        return torch.as_tensor(np.flatnonzero(mask))


def rank_share(indices: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """The part of a global batch that `rank` computes; together the parts are the batch."""
    return indices[rank::world_size]
