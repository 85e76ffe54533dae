"""Random ragged batches: per-trajectory lists for the oracles, flat tensors for the code under test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from mispo.algorithm.filter import Proposal
from mispo.algorithm.segments import offsets_of


@dataclass(frozen=True)
class Ragged:
    """`lengths` may hold zeros; `draw(name)` gives flat float32 noise [N] that depends on the name."""

    lengths: list[int]
    seed: int

    @property
    def offsets(self) -> Tensor:
        return offsets_of(torch.tensor(self.lengths, dtype=torch.int64))

    def tokens(self, name: str, scale: float = 1.0) -> Tensor:
        return torch.randn(sum(self.lengths), generator=self._generator(name)) * scale

    def trajectories(self, name: str) -> Tensor:
        return torch.randn(len(self.lengths), generator=self._generator(name))

    def split(self, flat: Tensor) -> list[list[float]]:
        """Python floats per trajectory: what an oracle reads."""
        return [part.double().tolist() for part in flat.split(self.lengths)]

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + sum(map(ord, name)))


def proposal(old_N: Tensor, rollout_N: Tensor, offsets_B1: Tensor, *, samples: int = 1, seed: int = 0) -> Proposal:
    """One rank's proposal with `samples` trajectories per prompt."""
    position_B = torch.arange(len(offsets_B1) - 1)
    return Proposal(old_N, rollout_N, offsets_B1, position_B, position_B // samples, seed, lambda x_B: x_B)


ragged = st.builds(Ragged, st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 2**31))
"""Batches of 1 to 12 trajectories of 0 to 40 tokens."""
