"""Losses as sums over a micro-batch divided by a denominator of the whole mini-batch.

The denominator counts over all ranks and micro-batches, so neither the split nor the number of ranks changes
the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mispo_loss(logprobs_n: Tensor, advantages_n: Tensor, weights_n: Tensor, denominator: Tensor) -> Tensor:
    """−Σ weight·Â·log π_θ / denominator, scalar (report §5.2.1).

    weights_n: `Selection.weights`, constant within the step: no importance weight, no clip. The gradient at a
    rejected token is exactly 0, whatever its log-prob or advantage.
    """
    kept_n = weights_n > 0
    # Both factors are masked: 0·∞ would be NaN, in the sum or in its gradient.
    coefficients_n = torch.where(kept_n, -weights_n * advantages_n, 0.0)
    return (coefficients_n * torch.where(kept_n, logprobs_n, 0.0)).sum() / denominator


def critic_loss(values_n: Tensor, targets_n: Tensor, included_n: Tensor, denominator: Tensor) -> Tensor:
    """Σ (V − target)² / denominator over the included tokens, scalar; rejected ones too (ours)."""
    return torch.where(included_n, (values_n - targets_n).square(), 0.0).sum() / denominator
