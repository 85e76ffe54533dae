"""The completion has to be well-formed: one closed think block, then an answer."""

from __future__ import annotations

from rewards.base import Reward, split_trace


def format_reward(task: str | None) -> Reward:
    """Look at the form of the completion alone; every task is scored alike."""
    return Reward(score_format)


def score_format(prompt: str, completion: str, answer: str, **row: object) -> float:
    """Return 1 for a well-formed trace, else 0."""
    return float(split_trace(completion).well_formed)
