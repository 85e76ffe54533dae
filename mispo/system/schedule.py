"""The schedule of a run: in which steps it evaluates, saves and attributes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """In which steps a run evaluates, saves and attributes.

    start: the last step of the checkpoint that is continued, None for a new run. evaluate_every, save_every,
    attribute_every: steps, 0 = only the last one (attribution: only the first one).
    """

    start: int | None
    steps: int
    pretrain_steps: int
    evaluate_every: int
    save_every: int
    attribute_every: int

    def evaluates(self, step: int) -> bool:
        """Return whether the held-out problems are due after this step."""
        return self._due(self.evaluate_every, step)

    def saves(self, step: int) -> bool:
        """Return whether a checkpoint is due after this step."""
        return self._due(self.save_every, step)

    def attributes(self, step: int) -> bool:
        """Return whether this step's mismatch is attributed."""
        return step == 1 or (self.attribute_every > 0 and self._due(self.attribute_every, step))

    def _due(self, every: int, step: int) -> bool:
        return step == self.steps or (every > 0 and step % every == 0)
