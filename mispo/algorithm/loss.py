"""Losses as sums over a micro-batch: the policy's, the critic's, and terms that may be added to the policy's.

A policy loss takes flat tensors [n] of whole trajectories and the offsets [b+1] that join them, and returns the sum of
its terms, weighted by weights_n, and the number of weighted tokens at which a clip stops the gradient. The caller
divides by a denominator (objective.py). Where a weight is 0, the gradient is exactly 0 for any log-prob and advantage
of the token. Filter and correction use x = π_old/π_rollout; the losses here use r = π_θ/π_old.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mispo.algorithm.filter import within
from mispo.algorithm.segments import owner_of, segment_mean

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logprobs_n with gradient, old_logprobs_n, advantages_n, weights_n, offsets_b1) → (Σ terms, clipped tokens)."""

Clip = tuple[float, float]
"""(ε_low, ε_high): ratios are clipped to [1 − ε_low, 1 + ε_high]."""


def mispo_loss(
    logprobs_n: Tensor, old_logprobs_n: Tensor, advantages_n: Tensor, weights_n: Tensor, offsets_b1: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute −Σ weight·Â·log π_θ: the score function, without ratio or clip (Step 3.5 Flash report §5.2.1)."""
    kept_n = weights_n > 0
    # Both factors are masked: 0·∞ would be NaN, in the sum or in its gradient.
    coefficients_n = torch.where(kept_n, -weights_n * advantages_n, 0.0)
    return (coefficients_n * torch.where(kept_n, logprobs_n, 0.0)).sum(), kept_n.new_zeros((), dtype=torch.int64)


def ppo_loss(
    logprobs_n: Tensor,
    old_logprobs_n: Tensor,
    advantages_n: Tensor,
    weights_n: Tensor,
    offsets_b1: Tensor,
    *,
    clip: Clip,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute −Σ weight·min(r·Â, clip(r)·Â), and where Â < 0 at most dual_clip·|Â| per token.

    Source: PPO (arXiv 1707.06347 eq. 7); different ε on both sides as in DAPO (2503.14476); dual clip 1912.09729.
    """
    kept_n = weights_n > 0
    ratio_n = torch.where(kept_n, logprobs_n - old_logprobs_n, 0.0).exp()
    return _clipped_sum(ratio_n, advantages_n, weights_n, clip, dual_clip)


def gspo_loss(
    logprobs_n: Tensor,
    old_logprobs_n: Tensor,
    advantages_n: Tensor,
    weights_n: Tensor,
    offsets_b1: Tensor,
    *,
    clip: Clip,
) -> tuple[Tensor, Tensor]:
    """Compute PPO's clipped loss with the trajectory ratio s = exp(mean_t log r_t) for all tokens of a trajectory.

    The gradient of token t is s·Â_t·∇log π_θ(a_t), so that advantages may differ within a trajectory. Source: GSPO
    (arXiv 2507.18071), its token form, eq. 13–14.
    """
    kept_n = weights_n > 0
    log_s_b = segment_mean(logprobs_n.detach() - old_logprobs_n, offsets_b1)
    log_s_n = log_s_b[owner_of(offsets_b1)].to(logprobs_n)
    moving_n = torch.where(kept_n, logprobs_n, 0.0)
    ratio_n = (torch.where(kept_n, log_s_n, 0.0) + moving_n - moving_n.detach()).exp()
    return _clipped_sum(ratio_n, advantages_n, weights_n, clip, None)


def cispo_loss(
    logprobs_n: Tensor,
    old_logprobs_n: Tensor,
    advantages_n: Tensor,
    weights_n: Tensor,
    offsets_b1: Tensor,
    *,
    clip: Clip,
) -> tuple[Tensor, Tensor]:
    """Compute −Σ weight·sg[clip(r)]·Â·log π_θ: the clip bounds a token's weight and never sets its gradient to 0.

    ε_low = 1 means no lower bound. Source: MiniMax-M1 (arXiv 2506.13585 eq. 4–5).
    """
    kept_n = weights_n > 0
    ratio_n = torch.where(kept_n, logprobs_n.detach() - old_logprobs_n, 0.0).exp()
    bounded_n = ratio_n.clamp(1 - clip[0], 1 + clip[1])
    total, _ = mispo_loss(logprobs_n, old_logprobs_n, advantages_n, weights_n * bounded_n, offsets_b1)
    return total, (kept_n & (ratio_n != bounded_n)).sum()


def _clipped_sum(
    ratio_n: Tensor, advantages_n: Tensor, weights_n: Tensor, clip: Clip, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    kept_n = weights_n > 0
    advantages_n = torch.where(kept_n, advantages_n, 0.0)
    free_n, bounded_n = ratio_n * advantages_n, ratio_n.clamp(1 - clip[0], 1 + clip[1]) * advantages_n
    gains_n, clipped_n = torch.minimum(free_n, bounded_n), bounded_n < free_n
    if dual_clip is not None:
        floor_n = torch.where(advantages_n < 0, dual_clip * advantages_n, -torch.inf)
        clipped_n = clipped_n | (gains_n < floor_n)
        gains_n = torch.maximum(gains_n, floor_n)
    return -(torch.where(kept_n, weights_n, 0.0) * gains_n).sum(), (kept_n & clipped_n).sum()


def no_correction(log_x_N: Tensor) -> Tensor:
    """Return weight 1 for every token, [N]."""
    return torch.ones_like(log_x_N)


def truncated_importance(log_x_N: Tensor, cap: float) -> Tensor:
    """Compute TIS weights min(x, C), x = π_old/π_rollout, [N]; 0 where x is NaN (Ionides 2008, here per token)."""
    capped_N = log_x_N.clamp(max=math.log(cap)).exp()
    return capped_N.nan_to_num(0.0)


def icepop(log_x_N: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Compute IcePop weights: x = π_old/π_rollout inside the bounds, 0 outside, [N] (Ring-1T, arXiv 2510.18855)."""
    inside_N = within(log_x_N, bounds)
    return torch.where(inside_N, torch.where(inside_N, log_x_N, 0.0).exp(), 0.0)


def unbiased_kl(logprobs_n: Tensor, old_logprobs_n: Tensor, reference_logprobs_n: Tensor, weights_n: Tensor) -> Tensor:
    """Estimate the KL to a reference: Σ weight·(π_θ/π_old)·(q − log q − 1), q = π_ref/π_θ, scalar.

    Unbiased in value and gradient on samples of π_old (Step 3.5 Flash report §5.2.3).
    """
    kept_n = weights_n > 0
    ratio_n = torch.where(kept_n, logprobs_n - old_logprobs_n, 0.0).exp()
    log_q_n = torch.where(kept_n, reference_logprobs_n - logprobs_n, 0.0)
    return (torch.where(kept_n, weights_n, 0.0) * ratio_n * (log_q_n.exp() - log_q_n - 1)).sum()


def critic_loss(
    values_n: Tensor,
    old_values_n: Tensor,
    targets_n: Tensor,
    included_n: Tensor,
    denominator: Tensor,
    value_clip: float | None,
) -> Tensor:
    """Compute Σ (V − target)² / denominator over the included tokens, scalar.

    Tokens that the filter rejects count too (ours). value_clip: unless None, the larger of two errors counts, of V and
    of V limited to old_values_n ± value_clip (PPO's value clip).
    """
    errors_n = (values_n - targets_n).square()
    if value_clip is not None:
        near_n = old_values_n + (values_n - old_values_n).clamp(-value_clip, value_clip)
        errors_n = torch.maximum(errors_n, (near_n - targets_n).square())
    return torch.where(included_n, errors_n, 0.0).sum() / denominator
