"""The Metropolis independence filter and its relatives: samples are selected, never re-weighted (report §5.2.1).

The rollout policy is the proposal, the trainer's snapshot the target. Everything stays in log space: a rejected
ratio is never exponentiated, so an infinite one cannot turn into NaN. Every filter takes a `Proposal`, the same on
any number of ranks, and returns a `Selection`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from mispo.algorithm.segments import owner_of, segment_mean, segment_sum

Bounds = tuple[float, float]
"""(lo, hi), both ends included."""


@dataclass(frozen=True)
class Proposal:
    """The samples that the rollout proposes in one step, on this rank.

    old_logprobs_N, rollout_logprobs_N: log-probs of the generated tokens. offsets_B1: joins tokens and trajectories.
    position_B: number of each trajectory within the step over all ranks; group_B: number of its prompt, whose
    trajectories all lie on one rank. seed: for the filter's random choices in this step. everyone: [B] of this rank →
    [total] of all ranks, by position.
    """

    old_logprobs_N: Tensor
    rollout_logprobs_N: Tensor
    offsets_B1: Tensor
    position_B: Tensor
    group_B: Tensor
    seed: int
    everyone: Callable[[Tensor], Tensor]

    @cached_property
    def log_x_N(self) -> Tensor:
        """Token ratios log π_old/π_rollout, [N] float64."""
        return self.old_logprobs_N.double() - self.rollout_logprobs_N.double()

    @cached_property
    def log_rho_B(self) -> Tensor:
        """Log of the trajectory ratios: mean of log x over all generated tokens, [B] float64; 0 if empty."""
        return segment_mean(self.log_x_N, self.offsets_B1)


@dataclass(frozen=True)
class Selection:
    """The samples that a filter keeps.

    keep_N: [N] bool, the token test. multiplicity_B: [B] int64, how often each trajectory counts (0 = rejected).
    log_rho_B: [B] float64, log of the trajectory ratio. window_B2: [B, 2] float64, the bounds on each trajectory's
    ratio, None if there were none.
    """

    keep_N: Tensor
    multiplicity_B: Tensor
    log_rho_B: Tensor
    window_B2: Tensor | None = None

    def weights(self, offsets_B1: Tensor) -> Tensor:
        """Return each token's weight in the actor's loss, [N] float32: 0, or its trajectory's multiplicity."""
        return self.keep_N * self.multiplicity_B[owner_of(offsets_B1)].float()


class Filter(Protocol):
    """A filter with its settings and state."""

    def __call__(self, proposal: Proposal) -> Selection:
        """Select samples of a step; every rank calls it with its own trajectories."""
        ...

    def state(self) -> dict[str, float]:
        """Return what a resumed run has to `restore`."""
        ...

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue where a checkpoint was; the state of another filter is ignored."""
        ...


@dataclass(frozen=True)
class FixedFilter:
    """A filter without state: a function of the proposal."""

    select: Callable[[Proposal], Selection]

    def __call__(self, proposal: Proposal) -> Selection:
        return self.select(proposal)

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Do nothing, since there is no state."""


def bounds_filter(proposal: Proposal, token_bounds: Bounds, trajectory_bounds: Bounds) -> Selection:
    """Apply the report's two tests: I(x_t) on tokens and I(ρ̄) on trajectories.

    ρ̄ counts all generated tokens, also those that the token test rejects. A ratio that is NaN is rejected.
    Source: report eq. for the MIS-PO loss, §5.2.1.
    """
    window_2 = torch.tensor(trajectory_bounds, dtype=torch.float64, device=proposal.log_rho_B.device)
    return window_filter(proposal, token_bounds, window_2.expand(len(proposal.log_rho_B), 2))


def window_filter(proposal: Proposal, token_bounds: Bounds, window_B2: Tensor) -> Selection:
    """Apply the two tests of `bounds_filter` with separate bounds for each trajectory, [B, 2] float64."""
    low_B, high_B = window_B2.log().unbind(1)
    accepted_B = (proposal.log_rho_B >= low_B) & (proposal.log_rho_B <= high_B)
    return Selection(within(proposal.log_x_N, token_bounds), accepted_B.long(), proposal.log_rho_B, window_B2)


def token_only(proposal: Proposal, token_bounds: Bounds) -> Selection:
    """Apply the token test alone; every trajectory counts. Ablation."""
    return Selection(within(proposal.log_x_N, token_bounds), torch.ones_like(proposal.group_B), proposal.log_rho_B)


def keep_all(proposal: Proposal) -> Selection:
    """Keep every sample. Ablation."""
    ones_N = torch.ones_like(proposal.log_x_N, dtype=torch.bool)
    return Selection(ones_N, torch.ones_like(proposal.group_B), proposal.log_rho_B)


def random_reject(proposal: Proposal, token_bounds: Bounds, trajectory_bounds: Bounds) -> Selection:
    """Keep as many trajectories as `bounds_filter` accepts over all ranks, but choose them at random.

    The token test is that of `bounds_filter`. Control experiment: does it matter *which* trajectories are selected?
    """
    accepted = within(proposal.everyone(proposal.log_rho_B), trajectory_bounds)
    order = torch.randperm(len(accepted), generator=torch.Generator().manual_seed(proposal.seed))
    chosen = torch.zeros(len(accepted), dtype=torch.int64)
    chosen[order[: int(accepted.sum())]] = 1
    multiplicity_B = chosen.to(proposal.position_B.device)[proposal.position_B]
    return Selection(within(proposal.log_x_N, token_bounds), multiplicity_B, proposal.log_rho_B)


def metropolis(proposal: Proposal, ratio: str) -> Selection:
    """Run a Metropolis independence chain for each prompt, over its samples in seeded order, starting with the first.

    A proposal τ' replaces the current state τ with probability min(1, w(τ')/w(τ)); else the current state repeats, so
    that the multiplicities of a prompt add up to its number of samples. ratio: "trajectory": w = ∏ x_t, for which the
    target π_old is stationary; "mean": w = ρ̄, a heuristic that hardly depends on the length. A sample whose ratio is
    not finite is never accepted. Source: Metropolis–Hastings with an independent proposal.
    """
    sums_B = segment_sum(proposal.log_x_N, proposal.offsets_B1)
    log_w_B = (sums_B if ratio == "trajectory" else proposal.log_rho_B).nan_to_num(-math.inf, -math.inf, -math.inf)
    multiplicity_B = torch.zeros_like(proposal.group_B)
    log_w = log_w_B.tolist()
    for group in proposal.group_B.unique().tolist():
        generator = torch.Generator().manual_seed((proposal.seed * 1_000_003 + group) % 2**63)
        members = (proposal.group_B == group).nonzero()[:, 0].cpu()
        order = members[torch.randperm(len(members), generator=generator)].tolist()
        uniforms = torch.rand(len(members), generator=generator, dtype=torch.float64).tolist()
        current = None
        for candidate, uniform in zip(order, uniforms, strict=True):
            if log_w[candidate] > -math.inf and (
                current is None or math.log(max(uniform, 1e-300)) < log_w[candidate] - log_w[current]
            ):
                current = candidate
            if current is not None:
                multiplicity_B[current] += 1
    return Selection(proposal.log_x_N.isfinite(), multiplicity_B, proposal.log_rho_B)


def within(log_ratio: Tensor, bounds: Bounds) -> Tensor:
    """Return whether a log ratio lies within bounds, which are ratios and not logs; false for NaN."""
    low, high = (math.log(bound) for bound in bounds)
    return (log_ratio >= low) & (log_ratio <= high)
