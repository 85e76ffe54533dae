"""From a trajectory to its reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from rewards.base import Item
from rollouts.trajectory import Trajectory


class Score(Protocol):
    """A finite value, what the reward functions said about it, and the value of each named part."""

    @property
    def value(self) -> float: ...
    @property
    def info(self) -> Mapping[str, object]: ...
    @property
    def parts(self) -> Mapping[str, float]: ...


class Grader(Protocol):
    """Scores items while its caller does something else; `RewardPool` is one."""

    def submit(self, ticket: int, item: Item) -> None:
        """Have an item scored. ticket: ≥ 0, of no other item that is being scored."""
        ...

    def finished(self, timeout_s: float) -> Sequence[tuple[int, Score]]:
        """Return (ticket, score) of what has been scored since the last call; wait at most so long for the first."""
        ...

    def score(self, items: Sequence[Item]) -> Sequence[Score]:
        """Score the items and wait for them; one score each, in order."""
        ...

    def close(self) -> None:
        """Free what it holds; safe to call twice."""
        ...


def item_of(trajectory: Trajectory) -> Item:
    """Say what is to be scored; truncated trajectories are scored too."""
    prompt = trajectory.prompt
    return {"prompt": prompt.text, "completion": trajectory.completion, "answer": prompt.answer, "row": prompt.row}


def graded(trajectory: Trajectory, score: Score) -> Trajectory:
    """Return the trajectory with its reward."""
    return replace(trajectory, reward=score.value, reward_info=dict(score.info), reward_parts=dict(score.parts))


def grade(trajectories: Sequence[Trajectory], grader: Grader) -> list[Trajectory]:
    """Score trajectories and wait for it; returns them with their rewards, in order."""
    scores = grader.score([item_of(trajectory) for trajectory in trajectories])
    return [graded(trajectory, score) for trajectory, score in zip(trajectories, scores, strict=True)]
