"""The flat batch of a step and its cuts: mini-batches for updates, micro-batches for memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from mispo.algorithm.segments import lengths_of, offsets_of
from mispo.trainer.ranks import Ranks
from model.moe.replay import laid_out
from rollouts.trajectory import Trajectory

FORWARDS_OF_ONE = 32
"""Empty micro-batches that cost about as much as a full one. So some padding is cheaper than one more micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Token sequences for a forward, and the places in them that are read.

    B sequences, N places in all. ids: of each sequence [S_b]. columns: of each sequence, the positions whose outputs
    belong to its scored tokens: the log-prob of generated token t and the value V(s_t) are read at P + t − 1.
    offsets_B1: joins places and sequences. experts: of each sequence [S_b−1, L, k], those that the actor's routers
    activate (router.replay); None = the routers choose.
    """

    ids: list[Tensor]
    columns: list[Tensor]
    offsets_B1: Tensor
    experts: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def tokens_of(self, members: Sequence[int]) -> Tensor:
        """Return the places in [N] of the tokens of these sequences, in order."""
        spans = [torch.arange(int(self.offsets_B1[b]), int(self.offsets_B1[b + 1])) for b in members]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)

    def offsets_of(self, members: Sequence[int]) -> Tensor:
        """Return the offsets [b+1] of the tokens of these sequences, laid out as `tokens_of` does."""
        return offsets_of(lengths_of(self.offsets_B1)[torch.tensor(list(members), dtype=torch.int64)])


@dataclass(frozen=True, kw_only=True)
class Batch(Sequences):
    """This rank's trajectories of a step, with their numbers as flat tensors.

    N = tokens that are scored: generated ones whose action mask is true. B = trajectories.
    step: its number; pre-training steps are negative. rewards_B: the verifier's. penalties_B ≤ 0: added for the length.
    included_B: false for trajectories that are left out everywhere (aborted, or truncated under `mask`). lags_B: actor
    updates that the weights of each trajectory are behind the trainer's. position_B: number within the step over all
    ranks; total: trajectories of all ranks. samples_per_prompt: trajectories of a prompt, whose positions are
    consecutive.
    """

    step: int
    ranks: Ranks
    trajectories: list[Trajectory]
    rollout_logprobs_N: Tensor
    rewards_B: Tensor
    penalties_B: Tensor
    truncated_B: Tensor
    included_B: Tensor
    lags_B: Tensor
    position_B: Tensor
    total: int
    samples_per_prompt: int

    @property
    def group_B(self) -> Tensor:
        """Number of each trajectory's prompt within the step, [B]."""
        return self.position_B // self.samples_per_prompt

    def everyone(self, x_B: Tensor) -> Tensor:
        """Gather the rows of all ranks by position: [B, …] of this rank → [total, …]. Collective."""
        return self.ranks.gather(x_B, self.position_B, self.total)

    def part(self, members: Sequence[int]) -> Batch:
        """Return a batch of these trajectories alone; position and total stay those of the step."""
        chosen = torch.tensor(list(members), dtype=torch.int64)
        by_trajectory = ("rewards_B", "penalties_B", "truncated_B", "included_B", "lags_B", "position_B")
        return replace(
            self,
            ids=[self.ids[b] for b in members],
            columns=[self.columns[b] for b in members],
            offsets_B1=self.offsets_of(members),
            experts=self.experts and [self.experts[b] for b in members],
            trajectories=[self.trajectories[b] for b in members],
            rollout_logprobs_N=self.rollout_logprobs_N[self.tokens_of(members)],
            **{name: getattr(self, name)[chosen] for name in by_trajectory},
        )


@dataclass(frozen=True)
class Packing:
    """How trajectories become a batch.

    truncation: algorithm.truncation. samples_per_prompt, prompts_per_step: of all ranks. penalty: tokens of a
    completion → what is added to its return, ≤ 0. replay: the actor activates the rollout's experts
    (router.replay=rollout).
    """

    truncation: str
    prompts_per_step: int
    samples_per_prompt: int
    penalty: Callable[[int], float]
    replay: bool = False


def pack(
    trajectories: list[Trajectory], positions_B: Tensor, packing: Packing, *, step: int, version: int, ranks: Ranks
) -> Batch:
    """Build the flat batch of this rank's trajectories.

    positions_B: their numbers within the step. version: actor updates so far. ValueError where router.replay needs
    experts that were not recorded.
    """
    if packing.replay and any(t.routed_experts is None for t in trajectories):
        raise ValueError("router.replay: rollout, but these trajectories have no record of the rollout's experts")
    scored = [t.action_mask.nonzero()[:, 0] for t in trajectories]
    logprobs = [t.rollout_logprobs[at] for t, at in zip(trajectories, scored, strict=True)]
    masked = packing.truncation == "mask"
    left_out = [t.finish_reason == "abort" or (masked and t.truncated) for t in trajectories]
    return Batch(
        ids=[torch.cat([t.prompt_ids, t.completion_ids]) for t in trajectories],
        columns=[at + len(t.prompt_ids) - 1 for t, at in zip(trajectories, scored, strict=True)],
        offsets_B1=offsets_of(torch.tensor([len(at) for at in scored], dtype=torch.int64)),
        experts=[t.routed_experts for t in trajectories if t.routed_experts is not None] if packing.replay else None,
        step=step,
        ranks=ranks,
        trajectories=trajectories,
        rollout_logprobs_N=torch.cat(logprobs) if logprobs else torch.empty(0),
        rewards_B=torch.tensor([t.reward for t in trajectories], dtype=torch.float32),
        penalties_B=torch.tensor([packing.penalty(len(t)) for t in trajectories], dtype=torch.float32),
        truncated_B=torch.tensor([t.truncated for t in trajectories], dtype=torch.bool),
        included_B=~torch.tensor(left_out, dtype=torch.bool),
        lags_B=torch.tensor([version - t.weight_version for t in trajectories], dtype=torch.int64),
        position_B=positions_B,
        total=packing.prompts_per_step * packing.samples_per_prompt,
        samples_per_prompt=packing.samples_per_prompt,
    )


def sequences(ids: list[Tensor], columns: list[Tensor]) -> Sequences:
    """Build token sequences without trajectories, read at these columns."""
    lengths = torch.tensor([len(c) for c in columns], dtype=torch.int64)
    return Sequences(ids=ids, columns=columns, offsets_B1=offsets_of(lengths))


def minibatches(batch: Batch, parts: int, seed: int) -> list[list[int]]:
    """Cut a seeded permutation of all trajectories into near-equal mini-batches; return this rank's members of each.

    Neither the number of ranks nor the micro-batches change which trajectories share a mini-batch. ValueError if there
    are more parts than trajectories.
    """
    if parts > batch.total:
        raise ValueError(f"{parts} mini-batches, but only {batch.total} trajectories in a step")
    order = torch.randperm(batch.total, generator=torch.Generator().manual_seed(seed))
    mine = {int(position): b for b, position in enumerate(batch.position_B)}
    cuts = [batch.total * part // parts for part in range(parts + 1)]
    return [[mine[p] for p in order[start:stop].tolist() if p in mine] for start, stop in pairwise(cuts)]


@dataclass(frozen=True)
class Layout:
    """How trajectories lie in a forward; changes speed and memory, never the result.

    tokens: at most so many in a micro-batch, padding included, but at least one trajectory. packed: one row in which
    trajectory follows trajectory, with nothing between them; else one row for each, padded on the right.
    """

    tokens: int
    packed: bool = False

    def microbatches(self, batch: Sequences, members: Sequence[int]) -> list[list[int]]:
        """Cut trajectories into parts, longest first, so that the first part needs the most memory."""
        order = sorted(members, key=lambda b: -len(batch.ids[b]))
        lengths = [len(batch.ids[b]) for b in order]
        parts = first_fit(lengths, self.tokens) if self.packed else least_padding(lengths, self.tokens)
        return [[order[i] for i in part] for part in parts]

    def input(
        self, batch: Sequences, members: Sequence[int], device: torch.device, *, last: bool = False
    ) -> ModelInput:
        """Lay out a micro-batch for the model; padding exists only here.

        last: read at each trajectory's last token (the state s_T) and not at its scored tokens. An empty micro-batch
        becomes one pad token whose output is not read, since other ranks wait for its forward.
        """
        ids = [batch.ids[b] for b in members] or [torch.zeros(1, dtype=torch.int64)]
        columns = [torch.tensor([len(batch.ids[b]) - 1]) if last else batch.columns[b] for b in members]
        rows = torch.repeat_interleave(
            torch.arange(len(columns)), torch.tensor([len(c) for c in columns], dtype=torch.int64)
        )
        at = torch.cat(columns) if columns else torch.empty(0, dtype=torch.int64)
        lengths = torch.tensor([len(i) for i in ids])
        # After the last token there is nothing to predict: the target of s_T is never used.
        following = (at + 1).minimum(lengths[rows] - 1)
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        targets = padded[rows, following]
        replay = None
        if batch.experts and members:
            widths = lengths.tolist() if self.packed else [padded.shape[1]] * len(ids)
            replay = laid_out([batch.experts[b] for b in members], widths, device)
        if not self.packed:
            # Padding is on the right, where causal attention does not look: it needs no mask.
            return ModelInput(
                padded.to(device),
                rows.to(device),
                at.to(device),
                targets.to(device),
                positions=None,
                lengths=tuple(lengths.tolist()),
                replay=replay,
            )
        starts = offsets_of(lengths)[:-1]
        positions = torch.cat([torch.arange(len(i)) for i in ids])[None]
        return ModelInput(
            torch.cat(ids)[None].to(device),
            torch.zeros_like(rows).to(device),
            (starts[rows] + at).to(device),
            targets.to(device),
            positions=positions.to(device),
            lengths=tuple(lengths.tolist()),
            replay=replay,
        )


def first_fit(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Pack `lengths` into rows of at most `tokens` (or one length), each into the first row with room; by index."""
    parts: list[list[int]] = []
    room: list[int] = []
    for i, length in enumerate(lengths):
        place = next((part for part, free in enumerate(room) if free >= length), None)
        if place is None:
            parts.append([i])
            room.append(tokens - length)
        else:
            parts[place].append(i)
            room[place] -= length
    return parts


def least_padding(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Cut descending `lengths` into runs of at most `tokens`, each as wide as its first length (or one length alone).

    The cut has the fewest padded tokens, where each run counts as `tokens` / FORWARDS_OF_ONE more.
    """
    count = len(lengths)
    best = torch.full((count + 1,), float("inf"), dtype=torch.float64)
    best[0] = 0.0
    start = torch.zeros(count + 1, dtype=torch.int64)
    for i, width in enumerate(lengths):
        most = min(max(1, tokens // width), count - i)
        costs = best[i] + tokens / FORWARDS_OF_ONE + width * torch.arange(1, most + 1, dtype=torch.float64)
        better = costs < best[i + 1 : i + 1 + most]
        best[i + 1 : i + 1 + most][better] = costs[better]
        start[i + 1 : i + 1 + most][better] = i
    parts: list[list[int]] = []
    while count:
        parts.append(list(range(int(start[count]), count)))
        count = int(start[count])
    return parts[::-1]


@dataclass(frozen=True)
class ModelInput:
    """The input of a forward, and where its outputs are read.

    ids [b, S]. rows, columns [n]: where outputs are read, in flat token order. targets [n]: the tokens that follow.
    positions [1, S]: of packed trajectories, 0 where one begins; transformers separates trajectories in attention by
    them, sliding windows included. None: each row is one trajectory. lengths: of the trajectories, in tokens. replay:
    the experts [L, b·S, k] for the actor's routers, and the tokens that have some, [b·S] bool; None = free choice.
    """

    ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    positions: Tensor | None
    lengths: tuple[int, ...]
    replay: tuple[Tensor, Tensor] | None = None

    @property
    def ends(self) -> Tensor:
        """For each place that is read, the column after its trajectory's last token, [n]."""
        lengths = torch.tensor(self.lengths, device=self.rows.device)
        if self.positions is None:
            return lengths[self.rows]
        ends = lengths.cumsum(0)
        return ends[torch.searchsorted(ends, self.columns, right=True)]

    @property
    def starts(self) -> list[int]:
        """Where each trajectory begins among the b·S tokens."""
        if self.positions is None:
            return [row * self.ids.shape[1] for row in range(len(self.lengths))]
        return offsets_of(torch.tensor(self.lengths))[:-1].tolist()
