"""A method: what actor and critic learn from the samples and scores of a step. Pure tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mispo.algorithm.advantage import gae, group_advantages, monte_carlo, terminal_values, whiten
from mispo.algorithm.filter import Filter, Proposal, Selection
from mispo.algorithm.objective import Objective, Samples
from mispo.algorithm.segments import Reduce, owner_of


@dataclass(frozen=True)
class Outcome:
    """How the trajectories of a step ended, on this rank, and their scores by critic and reference.

    rewards_B, penalties_B ≤ 0, truncated_B, included_B: as in `trainer.batch.Batch`. values_N: V(s_0 … s_{T−1});
    bootstrap_B: V(s_T); both None without a critic. reference_N: log π_ref, None without a KL term. reduce: sum over
    ranks.
    """

    rewards_B: Tensor
    penalties_B: Tensor
    truncated_B: Tensor
    included_B: Tensor
    values_N: Tensor | None
    bootstrap_B: Tensor | None
    reference_N: Tensor | None
    reduce: Reduce


@dataclass(frozen=True)
class ValueTargets:
    """What the critic learns from, constant over the step; all [N].

    old: V before the step's updates, for the clip. targets: the returns. included: bool, independent of the filter.
    """

    old: Tensor
    targets: Tensor
    included: Tensor


@dataclass(frozen=True)
class Targets:
    """What a step teaches: samples for the actor, values for the critic (None without one), and the selection.

    log_x_N: token ratios log π_old/π_rollout, float64.
    """

    samples: Samples
    values: ValueTargets | None
    selection: Selection
    log_x_N: Tensor


Advantage = Callable[[Tensor, Proposal, Outcome], "tuple[Tensor, Tensor | None]"]
"""(R̂ [B], proposal, outcome) → (advantages [N], critic targets [N], None without a critic)."""

Correction = Callable[[Tensor], Tensor]
"""log x [N] → weight of each token for the mismatch [N]."""


@dataclass(frozen=True)
class Method:
    """The parts of an RL method: filter, correction, advantage and objective.

    filter: selects samples. correct: weights them. advantage, truncation, reward_range: see advantage.py. whitens:
    whether advantages are scaled over the step (algorithm.whiten). rechecks: whether the filter is applied again with
    π_θ before each mini-batch (algorithm.mask_policy=current). learns_truncated: whether the critic's loss includes
    truncated trajectories. gamma: discount of the critic's pre-training.
    """

    filter: Filter
    correct: Correction
    objective: Objective
    advantage: Advantage
    truncation: str
    reward_range: tuple[float, float]
    whitens: bool
    rechecks: bool
    learns_truncated: bool
    gamma: float

    def targets(self, proposal: Proposal, outcome: Outcome) -> Targets:
        """Compute returns, advantages, selection and token weights of a step; every rank calls it with its share."""
        owner_N = owner_of(proposal.offsets_B1)
        included_N = outcome.included_B[owner_N]
        advantages_N, returns_N = self.advantage(self._terminal(outcome), proposal, outcome)
        if self.whitens:
            advantages_N = whiten(advantages_N, included_N, outcome.reduce)
        selection = self.select(proposal)
        samples = Samples(
            old_logprobs=proposal.old_logprobs_N,
            advantages=advantages_N,
            weights=self.weights(selection, proposal.log_x_N, proposal.offsets_B1, included_N),
            included=included_N,
            reference=outcome.reference_N,
        )
        values = None
        if returns_N is not None and outcome.values_N is not None:
            values = ValueTargets(outcome.values_N, returns_N, self._learnt(included_N, outcome.truncated_B[owner_N]))
        return Targets(samples, values, selection, proposal.log_x_N)

    def pretraining(self, offsets_B1: Tensor, outcome: Outcome) -> ValueTargets:
        """Return Monte-Carlo targets for a critic that has no values yet; truncated trajectories have none."""
        assert outcome.values_N is not None, "a method without a critic has nothing to pre-train"
        finished_N = (outcome.included_B & ~outcome.truncated_B)[owner_of(offsets_B1)]
        return ValueTargets(outcome.values_N, monte_carlo(outcome.rewards_B, offsets_B1, self.gamma), finished_N)

    def select(self, proposal: Proposal) -> Selection:
        """Apply filter and correction; each call updates the filter's state."""
        selection = self.filter(proposal)
        return replace(selection, keep_N=selection.keep_N & (self.correct(proposal.log_x_N) > 0))

    def weights(self, selection: Selection, log_x_N: Tensor, offsets_B1: Tensor, included_N: Tensor) -> Tensor:
        """Compute each token's weight in the policy loss, [N]: its multiplicity or 0, times the correction."""
        selected_N = selection.weights(offsets_B1) * included_N
        # Where the filter rejects, a correction may be infinite.
        return selected_N * torch.where(selected_N > 0, self.correct(log_x_N).to(selected_N), 0.0)

    def _terminal(self, outcome: Outcome) -> Tensor:
        zeros_B = torch.zeros(len(outcome.rewards_B))
        bootstrap_B = zeros_B if outcome.bootstrap_B is None else outcome.bootstrap_B
        ended = (outcome.rewards_B, bootstrap_B, outcome.truncated_B, self.truncation, self.reward_range)
        return outcome.penalties_B + terminal_values(*ended)

    def _learnt(self, included_N: Tensor, truncated_N: Tensor) -> Tensor:
        return included_N if self.learns_truncated else included_N & ~truncated_N


def with_critic(gamma: float, lam: float, critic_lam: float, bootstraps: bool) -> Advantage:
    """Return GAE with `lam` for the advantages and `critic_lam` for the critic's targets.

    bootstraps: whether the return of a truncated trajectory is a value one step ahead.
    """
    return partial(_from_critic, gamma=gamma, lam=lam, critic_lam=critic_lam, bootstraps=bootstraps)


def _from_critic(
    terminal_B: Tensor,
    proposal: Proposal,
    outcome: Outcome,
    *,
    gamma: float,
    lam: float,
    critic_lam: float,
    bootstraps: bool,
) -> tuple[Tensor, Tensor | None]:
    assert outcome.values_N is not None, "GAE needs the values of a critic"
    discounted_B = outcome.truncated_B & bootstraps
    advantages_N, targets_N = gae(outcome.values_N, terminal_B, discounted_B, proposal.offsets_B1, gamma, lam)
    if critic_lam != lam:
        _, targets_N = gae(outcome.values_N, terminal_B, discounted_B, proposal.offsets_B1, gamma, critic_lam)
    return advantages_N, targets_N


def within_group(baseline: str) -> Advantage:
    """Return advantages from the other samples of a prompt; baseline: as in `group_advantages`."""
    return partial(_from_group, baseline=baseline)


def _from_group(
    terminal_B: Tensor, proposal: Proposal, outcome: Outcome, *, baseline: str
) -> tuple[Tensor, Tensor | None]:
    advantages_B = group_advantages(terminal_B, outcome.included_B, proposal.group_B, baseline)
    return advantages_B[owner_of(proposal.offsets_B1)], None
