"""The answer has to be the reference answer, character by character."""

from __future__ import annotations

from rewards.base import Reward, split_trace


def exact_reward(task: str | None) -> Reward:
    """Compare the text after the thinking with the reference answer; every task is scored alike."""
    return Reward(score_exact)


def score_exact(prompt: str, completion: str, answer: str, **row: object) -> float:
    """Return 1 if the text after the thinking is the reference answer, else 0."""
    return float(split_trace(completion).answer == answer.strip())
