"""Advantages and critic targets: GAE with truncation-aware value bootstrapping (report §5.2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from mispo.algorithm.segments import Reduce, lengths_of, owner_of

MIN_STD = 0.01
"""Floor of the standard deviation in whitening: without it a step in which all rewards agree would amplify noise."""


def terminal_values(
    rewards_B: Tensor,
    bootstrap_B: Tensor,
    truncated_B: Tensor,
    truncation: str,
    reward_range: tuple[float, float],
) -> Tensor:
    """Return R̂ at the end of each trajectory, [B] (report §5.2.2).

    bootstrap_B: V(s_T), the critic's value after the last generated token. truncated_B: bool, from the engine.
    truncation: "bootstrap": V(s_T), clipped to the reward's range, replaces the reward of truncated trajectories;
    "zero": 0 replaces it; "mask": they keep their reward, since the caller leaves them out.
    """
    if truncation == "bootstrap":
        return torch.where(truncated_B, bootstrap_B.clamp(*reward_range), rewards_B)
    if truncation == "zero":
        return torch.where(truncated_B, 0.0, rewards_B)
    return rewards_B


def gae(
    values_N: Tensor,
    terminal_B: Tensor,
    discounted_B: Tensor,
    offsets_B1: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Compute generalised advantage estimates with the reward at the end, and critic targets; both [N] float32.

    values_N: V(s_0 … s_{T−1}). terminal_B: R̂ of `terminal_values`. discounted_B: bool, whether R̂ is a value one
    step ahead (a bootstrap: γ·V(s_T)) and not a reward. δ_t = γ·V(s_{t+1}) − V(s_t), δ_{T−1} = R̂ − V(s_{T−1}),
    Â_t = Σ_l (γλ)^l δ_{t+l}, target = Â + V. With γ = λ = 1: Â_t = R̂ − V(s_t).

    The sum is computed by doubling: log₂(longest trajectory) passes over the batch, without a loop over tokens.
    """
    values = values_N.double()
    owner = owner_of(offsets_B1)
    place = torch.arange(len(values), device=values.device)
    last = (offsets_B1[1:] - 1)[owner]
    following = torch.cat([values[1:], values.new_zeros(1)]) * gamma
    end = (terminal_B.double() * torch.where(discounted_B, gamma, 1.0))[owner]
    advantage = torch.where(place == last, end, following) - values
    longest = int(lengths_of(offsets_B1).max()) if len(offsets_B1) > 1 else 0
    reach = 1
    while reach < longest:
        ahead = torch.where(place + reach <= last, advantage.roll(-reach), 0.0)
        advantage = advantage + (gamma * lam) ** reach * ahead
        reach *= 2
    return advantage.float(), (advantage + values).float()


def whiten(advantages_N: Tensor, included_N: Tensor, reduce: Reduce) -> Tensor:
    """Scale advantages to (Â − mean)/max(std, 0.01), over the step's included tokens on all ranks; [N]. Ours."""
    chosen = advantages_N.double()[included_N]
    total, count = reduce(torch.stack([chosen.sum(), chosen.new_tensor(len(chosen))]))
    mean = total / count.clamp_min(1)
    variance = reduce((chosen - mean).square().sum()) / count.clamp_min(1)
    return ((advantages_N.double() - mean) / variance.sqrt().clamp_min(MIN_STD)).float()


def group_advantages(returns_B: Tensor, included_B: Tensor, group_B: Tensor, baseline: str) -> Tensor:
    """Compute advantages from the other samples of the same prompt, without a critic; [B] float32.

    included_B: bool; a trajectory that is left out does not count in its group and has advantage 0. group_B: ids of the
    prompts, whose trajectories all lie on this rank. baseline, with n samples of mean m and sample deviation s (n − 1):
    "group_std": (R − m)/s (GRPO, arXiv 2402.03300); "group_mean": R − m (Dr. GRPO, 2503.20783); "rloo": R minus the
    mean of the others, n/(n−1)·(R − m) (2402.14740). A group of one included sample has advantage 0.
    """
    _, groups_B = group_B.unique(return_inverse=True)
    included = included_B.double()
    zeros = included.new_zeros(int(groups_B.max()) + 1 if len(groups_B) else 0)
    returns = torch.where(included_B, returns_B.double(), 0.0)
    count_B = zeros.index_add(0, groups_B, included)[groups_B]
    mean_B = zeros.index_add(0, groups_B, returns)[groups_B] / count_B.clamp_min(1)
    centred_B = torch.where(included_B & (count_B > 1), returns - mean_B, 0.0)
    if baseline == "group_std":
        squares_B = zeros.index_add(0, groups_B, centred_B.square())[groups_B]
        centred_B = centred_B / (squares_B / (count_B - 1).clamp_min(1)).sqrt().clamp_min(1e-6)
    elif baseline == "rloo":
        centred_B = centred_B * count_B / (count_B - 1).clamp_min(1)
    return centred_B.float()


def monte_carlo(returns_B: Tensor, offsets_B1: Tensor, gamma: float) -> Tensor:
    """Compute γ^(T−1−t)·R for each token, the targets of a critic that has no values yet; [N] float32."""
    owner = owner_of(offsets_B1)
    ahead = (offsets_B1[1:] - 1)[owner] - torch.arange(len(owner), device=owner.device)
    return (gamma ** ahead.double() * returns_B.double()[owner]).float()
