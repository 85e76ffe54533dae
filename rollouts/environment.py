"""What an environment does between two samples of the engine."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from rollouts.engine import Sample
from rollouts.trajectory import Prompt


class Environment(Protocol):
    """Begins trajectories and replies to samples.

    Many trajectories are under way at once, so that a reply can depend on the sample alone. Tokens of a reply have
    action_mask false and rollout log-prob 0, and count towards max_new_tokens.
    """

    def start(self, prompt: Prompt) -> Tensor:
        """Return the token ids [P] that the engine begins with, P ≥ 1."""
        ...

    def reply(self, sample: Sample) -> Tensor | None:
        """Return the token ids [R] that the engine goes on from after this sample, or None if the trajectory is over.

        Asked only about samples with finish_reason "stop"; the others end their trajectory.
        """
        ...
