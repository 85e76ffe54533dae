"""Old weights, so that rollouts can lag behind the trainer on purpose, to study off-policy training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class WeightHistory:
    """Snapshots of the policy by version (actor optimizer updates), kept as long as `stale` may return them.

    lag: updates that the rollout weights are behind, ≥ 0. Snapshots lie in CPU memory.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._snapshots: dict[int, dict[str, Tensor]] = {}

    @property
    def versions(self) -> list[int]:
        """Versions held, oldest first."""
        return list(self._snapshots)

    @property
    def snapshots(self) -> dict[int, dict[str, Tensor]]:
        """Weights by version, oldest first, as a checkpoint saves them."""
        return dict(self._snapshots)

    def push(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights after `version` updates, and drop what no later call can return; versions must rise."""
        assert not self._snapshots or version > self.versions[-1], "versions must rise"
        self._snapshots[version] = {
            name: torch.empty_like(tensor, device="cpu").copy_(tensor.detach()) for name, tensor in weights.items()
        }
        chosen = self._chosen()
        self._snapshots = {held: kept for held, kept in self._snapshots.items() if held >= chosen}

    def stale(self) -> tuple[int, dict[str, Tensor]]:
        """Return (version, weights) of the newest snapshot at least `lag` updates older than the last one.

        The oldest snapshot, if none is old enough.
        """
        assert self._snapshots, "push the initial weights first"
        chosen = self._chosen()
        return chosen, self._snapshots[chosen]

    def _chosen(self) -> int:
        target = self.versions[-1] - self.lag
        return max((held for held in self.versions if held <= target), default=self.versions[0])
