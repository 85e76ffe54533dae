"""The flat batch of a step and its cuts: mini-batches for updates, micro-batches for memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mispo.algorithm.segments import lengths_of, offsets_of
from rollouts.trajectory import Trajectory


@dataclass(frozen=True)
class Batch:
    """This rank's trajectories of a step.

    N = tokens that are scored: generated ones whose action mask is true. B = trajectories, S_b = P_b + T_b.
    ids: per trajectory [S_b]. columns: per trajectory, the positions whose outputs belong to its scored tokens:
    the log-prob of generated token t and the value V(s_t) are read at P + t − 1.
    offsets_B1: joins tokens and trajectories. rewards_B: the verifier's; penalties_B ≤ 0: added for the length.
    position_B: number within the step over all ranks; total: how many
    there are over all ranks.
    included_B: false for trajectories that are left out everywhere (aborted, or truncated under `mask`).
    """

    ids: list[Tensor]
    columns: list[Tensor]
    offsets_B1: Tensor
    rollout_logprobs_N: Tensor
    rewards_B: Tensor
    penalties_B: Tensor
    truncated_B: Tensor
    included_B: Tensor
    position_B: Tensor
    total: int

    def __len__(self) -> int:
        return len(self.ids)

    def tokens_of(self, members: Sequence[int]) -> Tensor:
        """Places in [N] of the tokens of these trajectories, in order."""
        spans = [torch.arange(int(self.offsets_B1[b]), int(self.offsets_B1[b + 1])) for b in members]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)

    def part(self, members: Sequence[int]) -> Batch:
        """These trajectories as a batch of their own; position and total stay those of the step."""
        chosen = torch.tensor(list(members), dtype=torch.int64)
        return Batch(
            ids=[self.ids[b] for b in members],
            columns=[self.columns[b] for b in members],
            offsets_B1=self.offsets_of(members),
            rollout_logprobs_N=self.rollout_logprobs_N[self.tokens_of(members)],
            total=self.total,
            **{
                name: getattr(self, name)[chosen]
                for name in ("rewards_B", "penalties_B", "truncated_B", "included_B", "position_B")
            },
        )

    def offsets_of(self, members: Sequence[int]) -> Tensor:
        """Offsets [b+1] of the tokens of these trajectories, laid out as `tokens_of` does."""
        return offsets_of(lengths_of(self.offsets_B1)[torch.tensor(list(members), dtype=torch.int64)])


def pack(
    trajectories: Sequence[Trajectory],
    *,
    truncation: str,
    first: int,
    total: int,
    penalty: Callable[[int], float] = lambda length: 0.0,
) -> Batch:
    """Lay this rank's trajectories out flat; they are numbers first, first+1, … of `total` in the step.

    penalty: of a completion's number of tokens.
    """
    columns, logprobs = [], []
    for trajectory in trajectories:
        scored = trajectory.action_mask.nonzero()[:, 0]
        columns.append(scored + len(trajectory.prompt_ids) - 1)
        logprobs.append(trajectory.rollout_logprobs[scored])
    left_out = [t.finish_reason == "abort" or (truncation == "mask" and t.truncated) for t in trajectories]
    return Batch(
        ids=[torch.cat([t.prompt_ids, t.completion_ids]) for t in trajectories],
        columns=columns,
        offsets_B1=offsets_of(torch.tensor([len(c) for c in columns], dtype=torch.int64)),
        rollout_logprobs_N=torch.cat(logprobs) if logprobs else torch.empty(0),
        rewards_B=torch.tensor([t.reward for t in trajectories], dtype=torch.float32),
        penalties_B=torch.tensor([penalty(len(t)) for t in trajectories], dtype=torch.float32),
        truncated_B=torch.tensor([t.truncated for t in trajectories], dtype=torch.bool),
        included_B=~torch.tensor(left_out, dtype=torch.bool),
        position_B=torch.arange(first, first + len(trajectories)),
        total=total,
    )


def minibatches(batch: Batch, parts: int, seed: int) -> list[list[int]]:
    """This rank's members of each mini-batch: a seeded permutation of all trajectories, cut into near-equal parts.

    Neither the number of ranks nor the micro-batches change which trajectories meet. ValueError if there are
    more parts than trajectories.
    """
    if parts > batch.total:
        raise ValueError(f"{parts} mini-batches, but only {batch.total} trajectories in a step")
    order = torch.randperm(batch.total, generator=torch.Generator().manual_seed(seed))
    mine = {int(position): b for b, position in enumerate(batch.position_B)}
    cuts = [batch.total * part // parts for part in range(parts + 1)]
    return [[mine[p] for p in order[start:stop].tolist() if p in mine] for start, stop in pairwise(cuts)]


def microbatches(batch: Batch, members: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cut trajectories into parts of at most `token_budget` padded tokens (or one trajectory), longest first."""
    parts: list[list[int]] = []
    width = 0
    for b in sorted(members, key=lambda b: -len(batch.ids[b])):
        if parts and width * (len(parts[-1]) + 1) <= token_budget:
            parts[-1].append(b)
        else:
            parts.append([b])
            width = len(batch.ids[b])
    return parts


@dataclass(frozen=True)
class ModelInput:
    """A padded micro-batch: ids [b, S], and where to read: rows [n], columns [n], in flat token order."""

    ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor


def model_input(batch: Batch, members: Sequence[int], device: torch.device, *, last: bool = False) -> ModelInput:
    """Padding exists only here. Padded on the right: causal attention never looks there.

    last: read at each trajectory's last token (the state s_T) and not at its scored tokens. An empty micro-batch
    becomes one pad token of which nothing is read: other ranks wait for its forward.
    """
    chosen = [batch.ids[b] for b in members] or [torch.zeros(1, dtype=torch.int64)]
    ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    at = [torch.tensor([len(batch.ids[b]) - 1]) if last else batch.columns[b] for b in members]
    rows = torch.repeat_interleave(torch.arange(len(at)), torch.tensor([len(c) for c in at], dtype=torch.int64))
    columns = torch.cat(at) if at else torch.empty(0, dtype=torch.int64)
    # After the last token there is nothing to predict: the target of s_T is never used.
    targets = ids[rows, (columns + 1).clamp_max(ids.shape[1] - 1)]
    return ModelInput(*(t.to(device) for t in (ids, rows, columns, targets)))
