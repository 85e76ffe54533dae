"""Reductions over the trajectories of a flat batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LENGTH_EDGES = (0, 16, 64, 256, 1024, 4096, 16384)
"""Lower edges of the length buckets, in generated tokens."""

Reduce = Callable[[Tensor], Tensor]
"""Sum of a tensor over all ranks; the identity for one rank."""


def lengths_of(offsets_B1: Tensor) -> Tensor:
    """Compute tokens per trajectory [B] from offsets [B+1]."""
    return offsets_B1[1:] - offsets_B1[:-1]


def offsets_of(lengths_B: Tensor) -> Tensor:
    """Compute offsets [B+1] from tokens per trajectory [B]."""
    return torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0))


def bucket_of(lengths_B: Tensor) -> Tensor:
    """Return the number of each trajectory's length bucket, [B] int64."""
    edges = torch.tensor(LENGTH_EDGES[1:], dtype=lengths_B.dtype, device=lengths_B.device)
    return torch.bucketize(lengths_B, edges, right=True)


def owner_of(offsets_B1: Tensor) -> Tensor:
    """Return the index of each token's trajectory, [N]."""
    lengths_B = lengths_of(offsets_B1)
    return torch.repeat_interleave(torch.arange(len(lengths_B), device=offsets_B1.device), lengths_B)


def segment_sum(x_N: Tensor, offsets_B1: Tensor) -> Tensor:
    """Sum over each trajectory's tokens, [B], accumulated in float64."""
    sums_B = torch.zeros(len(offsets_B1) - 1, dtype=torch.float64, device=x_N.device)
    return sums_B.index_add_(0, owner_of(offsets_B1), x_N.double())


def segment_mean(x_N: Tensor, offsets_B1: Tensor) -> Tensor:
    """Compute the mean over each trajectory's tokens, [B] float64; 0 for an empty trajectory."""
    return segment_sum(x_N, offsets_B1) / lengths_of(offsets_B1).clamp_min(1)


def segment_logsumexp(x_N: Tensor, offsets_B1: Tensor) -> Tensor:
    """Compute log Σ exp(x) over each trajectory's tokens, [B] float64; −∞ for an empty trajectory."""
    owner_N = owner_of(offsets_B1)
    highest_B = torch.full((len(offsets_B1) - 1,), -torch.inf, dtype=torch.float64, device=x_N.device)
    highest_B.scatter_reduce_(0, owner_N, x_N.double(), "amax")
    shift_B = highest_B.nan_to_num(0.0, 0.0, 0.0)
    return segment_sum((x_N.double() - shift_B[owner_N]).exp(), offsets_B1).log() + shift_B
