"""The Metropolis independence filter: samples are selected, never re-weighted (report §5.2.1).

The rollout policy is the proposal, the trainer's snapshot the target. Everything stays in log space: a rejected
ratio is never exponentiated, so an infinite one cannot turn into NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mispo.algorithm.segments import owner_of, segment_mean


@dataclass(frozen=True)
class Selection:
    """What a filter keeps.

    keep_N: [N] bool, the token test. multiplicity_B: [B] int64, how often each trajectory counts (0 = rejected).
    log_rho_B: [B] float64, log of the trajectory ratio (geometric mean of the token ratios).
    """

    keep_N: Tensor
    multiplicity_B: Tensor
    log_rho_B: Tensor

    def weights(self, offsets_B1: Tensor) -> Tensor:
        """Weight of each token in the actor's loss, [N] float32: 0, or its trajectory's multiplicity."""
        return self.keep_N * self.multiplicity_B[owner_of(offsets_B1)].float()


def bounds_filter(
    old_logprobs_N: Tensor,
    rollout_logprobs_N: Tensor,
    offsets_B1: Tensor,
    token_bounds: tuple[float, float],
    trajectory_bounds: tuple[float, float],
) -> Selection:
    """The report's two tests, both ends included: I(x_t) on tokens and I(ρ̄) on trajectories.

    x_t = π_old(a_t)/π_rollout(a_t); log ρ̄ = mean_t log x_t over all generated tokens, also those that the token
    test rejects. A ratio that is no number is rejected. Source: report eq. for the MIS-PO loss, §5.2.1.
    """
    log_x_N = old_logprobs_N.double() - rollout_logprobs_N.double()
    log_rho_B = segment_mean(log_x_N, offsets_B1)
    keep_N = _within(log_x_N, token_bounds)
    return Selection(keep_N, _within(log_rho_B, trajectory_bounds).long(), log_rho_B)


def keep_all(old_logprobs_N: Tensor, rollout_logprobs_N: Tensor, offsets_B1: Tensor) -> Selection:
    """No filter: the ablation."""
    log_rho_B = segment_mean(old_logprobs_N.double() - rollout_logprobs_N.double(), offsets_B1)
    ones_B = torch.ones(len(log_rho_B), dtype=torch.int64, device=log_rho_B.device)
    return Selection(torch.ones_like(old_logprobs_N, dtype=torch.bool), ones_B, log_rho_B)


def _within(log_ratio: Tensor, bounds: tuple[float, float]) -> Tensor:
    low, high = (math.log(bound) for bound in bounds)
    return (log_ratio >= low) & (log_ratio <= high)
