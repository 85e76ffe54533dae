"""One question, one answer: the default environment."""

from __future__ import annotations

from torch import Tensor

from rollouts.engine import Sample
from rollouts.trajectory import Prompt


class SingleTurn:
    """`Environment` that starts with the prompt as it is and never replies."""

    def start(self, prompt: Prompt) -> Tensor:
        """Return the prompt's token ids."""
        return prompt.ids

    def reply(self, sample: Sample) -> None:
        """Say that the trajectory is over."""
        return None
