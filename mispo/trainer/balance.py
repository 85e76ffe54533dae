"""Equal work for all ranks: whole prompts move from ranks with long trajectories to those with short ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mispo.trainer.ranks import Ranks
from rollouts.trajectory import Trajectory


def share_out(
    ranks: Ranks, trajectories: list[Trajectory], prompts: int, each: int, cost: Callable[[int], float]
) -> tuple[list[Trajectory], Tensor, dict[str, float]]:
    """Balance the ranks' work: return the trajectories of this rank, their numbers in the step [B], and metrics.

    trajectories: of this rank's contiguous share of the step's `prompts`, `each` of them for a prompt. A prompt's
    trajectories stay together. cost: of a trajectory, by its number of tokens. perf/balance: mean over largest load.
    """
    mine = list(ranks.share(prompts))
    if ranks.size == 1:
        return trajectories, torch.arange(len(trajectories)), {}
    groups = {p: trajectories[i * each : (i + 1) * each] for i, p in enumerate(mine)}
    costs = [sum(cost(len(t.prompt_ids) + len(t.completion_ids)) for t in groups[p]) for p in mine]
    costs_P = ranks.gather(torch.tensor(costs, dtype=torch.float64), torch.tensor(mine, dtype=torch.int64), prompts)
    owners = [rank for rank in range(ranks.size) for _ in Ranks(rank, ranks.size, ranks.device).share(prompts)]
    owners = balanced(costs_P.tolist(), owners, ranks.size)
    leaving = [(p, group) for p, group in groups.items() if owners[p] != ranks.rank]
    groups |= dict(ranks.concatenate(leaving))
    kept = [p for p in range(prompts) if owners[p] == ranks.rank]
    positions_B = torch.tensor([p * each + sample for p in kept for sample in range(each)], dtype=torch.int64)
    loads = loads_of(costs_P.tolist(), owners, ranks.size)
    share = {"perf/balance": sum(loads) / len(loads) / max(loads) if max(loads) else 1.0}
    return [trajectory for p in kept for trajectory in groups[p]], positions_B, share


def balanced(costs: Sequence[float], owners: Sequence[int], ranks: int) -> list[int]:
    """Move few items to make the largest load small, always from the most to the least loaded rank; return owners."""
    owners, loads = list(owners), loads_of(costs, owners, ranks)
    while True:
        most, least = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[most] - loads[least]
        # Items so small, or so near to the gap, that rounding would move them back and forth for ever do not count.
        low, high = 1e-9 * loads[most], (1 - 1e-9) * gap
        candidates = [i for i, owner in enumerate(owners) if owner == most and low < costs[i] < high]
        if not candidates:
            return owners
        # The item nearest to half of the gap makes the two loads most equal; each move shrinks Σ load².
        chosen = min(candidates, key=lambda i: abs(costs[i] - gap / 2))
        owners[chosen] = least
        loads[most] -= costs[chosen]
        loads[least] += costs[chosen]


def loads_of(costs: Sequence[float], owners: Sequence[int], ranks: int) -> list[float]:
    """Sum the costs of each rank's items."""
    return [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
