"""What the filter did and how far rollout and trainer are apart.

All functions take per-trajectory tensors [B] of the whole step (all ranks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mispo.algorithm.filter import Selection
from mispo.algorithm.segments import (
    LENGTH_EDGES,
    bucket_of,
    lengths_of,
    owner_of,
    segment_logsumexp,
    segment_sum,
)

FINEST, COARSEST, STEPS_PER_DECADE = -8, 2, 40
"""Histogram of |log x|: from 1e-8 to 1e2 nats, 40 bins a decade, so that a quantile is off by less than 6 %."""


@dataclass(frozen=True)
class MismatchSums:
    """Sums over the tokens of each trajectory, [B] float64, so that ranks can be put together.

    log_x1_B and log_x2_B: log of Σ x and of Σ x², since the sums themselves may overflow. rollout_B: Σ −log π_rollout.
    """

    k1_B: Tensor
    k3_B: Tensor
    log_x1_B: Tensor
    log_x2_B: Tensor
    max_abs_B: Tensor
    kept_B: Tensor
    lengths_B: Tensor
    rollout_B: Tensor


def mismatch_sums(log_x_N: Tensor, rollout_logprobs_N: Tensor, keep_N: Tensor, offsets_B1: Tensor) -> MismatchSums:
    """Sum up what `mismatch_metrics` needs, from one rank's tokens. log_x_N: log π_old/π_rollout, float64."""
    lengths_B = lengths_of(offsets_B1)
    max_abs_B = torch.zeros(len(lengths_B), dtype=torch.float64, device=log_x_N.device)
    max_abs_B.scatter_reduce_(0, owner_of(offsets_B1), log_x_N.abs(), "amax")
    return MismatchSums(
        k1_B=segment_sum(-log_x_N, offsets_B1),
        k3_B=segment_sum(log_x_N.exp() - 1 - log_x_N, offsets_B1),
        log_x1_B=segment_logsumexp(log_x_N, offsets_B1),
        log_x2_B=segment_logsumexp(2 * log_x_N, offsets_B1),
        max_abs_B=max_abs_B,
        kept_B=segment_sum(keep_N, offsets_B1),
        lengths_B=lengths_B.double(),
        rollout_B=segment_sum(-rollout_logprobs_N, offsets_B1),
    )


def ratio_histogram(log_x_N: Tensor) -> Tensor:
    """Count one rank's tokens by |log x|, float64, [H] int64; histograms of ranks add up."""
    bins = (COARSEST - FINEST) * STEPS_PER_DECADE
    sizes_N = log_x_N.abs()
    numbers_N = ((sizes_N.log10() - FINEST) * STEPS_PER_DECADE).nan_to_num(bins - 1, bins - 1, 0).clamp(0, bins - 1)
    return torch.bincount(numbers_N.long(), minlength=bins)


def _quantile(counts_H: Tensor, share: float) -> float:
    """Return the upper edge of the bin in which the quantile lies; 0 for the finest one, which has |log x| = 0."""
    number = int(torch.searchsorted(counts_H.cumsum(0).double(), counts_H.sum() * share))
    return 10 ** (FINEST + (number + 1) / STEPS_PER_DECADE) if number else 0.0


def mismatch_metrics(sums: MismatchSums, sizes_H: Tensor) -> dict[str, float]:
    """Measure how far rollout and trainer are apart, over tokens. sizes_H: `ratio_histogram` of all ranks.

    KL(π_rollout ‖ π_old) in nats, by k1 = −log x (unbiased) and k3 = x − 1 − log x (≥ 0); χ²(π_old ‖ π_rollout) =
    mean x² − 1; the share ess = (Σx)²/(N·Σx²) of the samples that importance weighting would leave effective; the
    largest |log x|, its median and 99th percentile; the perplexity of the samples under both policies; and the share
    of tokens that pass the token test.
    """
    tokens = sums.lengths_B.sum().clamp_min(1)
    log_x1, log_x2 = sums.log_x1_B.logsumexp(0), sums.log_x2_B.logsumexp(0)
    return {
        "mismatch/k1": (sums.k1_B.sum() / tokens).item(),
        "mismatch/k3": (sums.k3_B.sum() / tokens).item(),
        "mismatch/chi2": ((log_x2 - tokens.log()).exp() - 1).item(),
        "mismatch/ess": (2 * log_x1 - log_x2 - tokens.log()).exp().item(),
        "mismatch/max_abs": sums.max_abs_B.max().item(),
        "mismatch/p50_abs": _quantile(sizes_H, 0.5),
        "mismatch/p99_abs": _quantile(sizes_H, 0.99),
        "mismatch/ppl_rollout": (sums.rollout_B.sum() / tokens).exp().item(),
        "mismatch/ppl_old": ((sums.rollout_B + sums.k1_B).sum() / tokens).exp().item(),
        "mis/token_accept": (sums.kept_B.sum() / tokens).item(),
    }


def acceptance_metrics(selection: Selection, lengths_B: Tensor, rewards_B: Tensor, lags_B: Tensor) -> dict[str, float]:
    """Measure the acceptance of trajectories: overall, by reward sign, length, lag, and side of the window.

    Reward sign: above or not above the mean of the step. lags_B: actor updates that a trajectory's weights were behind
    the trainer's. Buckets without a trajectory are left out.
    """
    accepted = (selection.multiplicity_B > 0).double()
    log_rho = selection.log_rho_B
    better = rewards_B > rewards_B.mean()
    quantiles = torch.quantile(log_rho.nan_to_num(), torch.tensor([0.05, 0.95]).to(log_rho)).exp()
    metrics = {
        "mis/traj_accept": accepted.mean().item(),
        "mis/log_rho_mean": log_rho.mean().item(),
        "mis/rho_p05": quantiles[0].item(),
        "mis/rho_p95": quantiles[1].item(),
    }
    if selection.window_B2 is not None:
        low_B, high_B = selection.window_B2.log().unbind(1)
        metrics["mis/traj_reject_low"] = (log_rho < low_B).double().mean().item()
        metrics["mis/traj_reject_high"] = (log_rho > high_B).double().mean().item()
        metrics["mis/window_high"] = selection.window_B2[:, 1].max().item()
    for name, chosen in (("pos", better), ("neg", ~better)):
        if chosen.any():
            metrics[f"mis/accept_{name}"] = accepted[chosen].mean().item()
    buckets = bucket_of(lengths_B)
    for number in buckets.unique().tolist():
        metrics[f"mis/accept_len/{LENGTH_EDGES[number]}"] = accepted[buckets == number].mean().item()
    for lag in lags_B.unique().tolist():
        metrics[f"mis/accept_lag/{int(lag)}"] = accepted[lags_B == lag].mean().item()
    return metrics
