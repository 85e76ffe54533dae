"""Where the graded trajectories of a step come from, and where new weights go."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rollouts.engine import Engine
from rollouts.environment import Environment
from rollouts.episodes import Sampling, play
from rollouts.grading import Grader, Score, graded, item_of
from rollouts.trajectory import Prompt, Trajectory

T = TypeVar("T")

Group = list[Trajectory]
"""All samples of one prompt."""

Clock = Callable[[str], AbstractContextManager[None]]
"""Measures the phase of this name while the context is open."""

LOOK_UP_S = 0.5
"""Seconds between two looks at whether to stop, while scores are waited for."""


@dataclass(frozen=True)
class Taken:
    """This rank's graded trajectories of a step, whole prompts in order; and metrics."""

    trajectories: list[Trajectory]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Weights:
    """Weights for the engine, and log-probs `expected` [T] of the completions of `probe` under them."""

    version: int
    tensors: Mapping[str, Tensor]
    probe: list[tuple[Tensor, Tensor]]
    expected: list[Tensor]


class Sampler(Protocol):
    """Where trajectories come from; all methods are collective."""

    def take(self, step: int) -> Taken:
        """Return the trajectories of a step; fewer if the run is asked to stop meanwhile."""
        ...

    def publish(self, weights: Weights | None) -> dict[str, float]:
        """Sample with these weights from now on; returns sync/* metrics. None where nothing is sampled."""
        ...

    def close(self) -> None:
        """End what works for it."""
        ...


class Peers(Protocol):
    """The other ranks, as a sampler needs them."""

    def share(self, count: int) -> range:
        """Return which of `count` items this rank works on: contiguous, near-equal."""
        ...

    def concatenate(self, items: list[T]) -> list[T]:
        """Return the items of all ranks, those of the first one first."""
        ...

    def any(self, flag: bool) -> bool:
        """Say whether it is true on any rank."""
        ...


@dataclass(frozen=True)
class StepSettings:
    """What a step is made of.

    prompts_per_step: over all ranks. permute: shuffle the rewards among this rank's trajectories (reward.permute).
    max_rounds: replace prompts whose samples all got the same reward, in at most so many rounds; None = keep them.
    parity_tolerance: nats per token, see rollout.parity_tolerance.
    """

    prompts_per_step: int
    sampling: Sampling
    permute: bool
    max_rounds: int | None
    parity_tolerance: float


@dataclass
class SynchronousSampler:
    """`Sampler` that samples a step's trajectories when they are asked for, and grades them meanwhile.

    prompts: gives the next so many prompts, the same on all ranks. asked: whether the run is to stop; what is being
    sampled is then cancelled. clock: of the phases rollout, and reward: waiting for scores after the last sample.
    """

    engine: Engine
    environment: Environment
    prompts: Callable[[int], Sequence[Prompt]]
    grader: Grader
    tokenizer: PreTrainedTokenizerBase
    settings: StepSettings
    peers: Peers
    asked: Callable[[], bool]
    clock: Clock
    _submitted: int = 0

    def take(self, step: int) -> Taken:
        """Sample and grade this rank's share of the step's prompts.

        Metrics with max_rounds: rollout/rounds, and rollout/filled: share of the prompts that are not informative.
        """
        metrics: dict[str, float] = {}
        if self.settings.max_rounds is None:
            groups = self._round(self.settings.prompts_per_step)
        else:
            groups, metrics = self._rounds(self.settings.max_rounds)
        trajectories = [trajectory for group in groups for trajectory in group]
        if self.settings.permute:
            trajectories = permuted(trajectories, self.settings.sampling.seed, step)
        return Taken(trajectories, metrics)

    def publish(self, weights: Weights | None) -> dict[str, float]:
        """Load the weights into the engine and prove that it took them. RuntimeError if it did not."""
        assert weights is not None, "a sampler with an engine needs weights"
        return published(self.engine, weights, self.settings.sampling.temperature, self.settings.parity_tolerance)

    def close(self) -> None:
        """End the processes that grade."""
        self.grader.close()

    def _rounds(self, most: int) -> tuple[list[Group], dict[str, float]]:
        """Sample until the prompts are informative, or `most` times; fill what is missing with the others."""
        wanted = self.settings.prompts_per_step
        kept: list[Group] = []
        spare: list[Group] = []
        rounds, stopped = 0, False
        while len(kept) < wanted and rounds < most and not stopped:
            # Which prompts are replaced is decided together: their number on each rank differs.
            for group in self.peers.concatenate(self._round(wanted - len(kept))):
                (kept if informative(group) else spare).append(group)
            rounds, stopped = rounds + 1, self.peers.any(self.asked())
        chosen = [*kept, *spare][:wanted]
        metrics = {"rollout/rounds": float(rounds), "rollout/filled": (wanted - len(kept)) / wanted}
        return [chosen[place] for place in self.peers.share(len(chosen))], metrics

    def _round(self, count: int) -> list[Group]:
        """Sample and grade this rank's share of the next `count` prompts; only whole groups if asked to stop."""
        prompts, sampling = self.prompts(count), self.settings.sampling
        mine = [prompts[place] for place in self.peers.share(count)]
        first = self._submitted
        self._submitted += len(mine) * sampling.samples_per_prompt
        ended: dict[int, Trajectory] = {}
        scores: dict[int, Score] = {}
        with self.clock("rollout"):
            for pairs in play(self.engine, self.environment, self.tokenizer, mine, sampling, self.asked):
                for place, trajectory in pairs:
                    ended[place] = trajectory
                    self.grader.submit(first + place, item_of(trajectory))
                scores |= self._scored(first, 0.0)
        with self.clock("reward"):
            while len(scores) < len(ended) and not self.asked():
                scores |= self._scored(first, LOOK_UP_S)
        whole = {place: graded(ended[place], score) for place, score in scores.items()}
        return grouped(whole, len(mine), sampling.samples_per_prompt)

    def _scored(self, first: int, timeout_s: float) -> dict[int, Score]:
        """Scores by place; what is left from a step that was stopped is ignored."""
        return {ticket - first: score for ticket, score in self.grader.finished(timeout_s) if ticket >= first}


def published(engine: Engine, weights: Weights, temperature: float, tolerance: float) -> dict[str, float]:
    """Load weights into an engine, and compare its log-probs with those that are expected.

    Returns sync/mean_abs and sync/max_abs, in nats per token. RuntimeError if the mean is above the tolerance.
    """
    engine.load(weights.tensors, weights.version)
    scores = engine.score(weights.probe, temperature)
    gaps = torch.cat([(a - b).abs() for a, b in zip(scores, weights.expected, strict=True)])
    gap = gaps.mean().item()
    # The mean: in bf16 a single token whose routing flips may be off by a nat.
    if not gap <= tolerance:
        raise RuntimeError(
            f"weight sync: engine and trainer differ by {gap:.3g} nats per token on the same weights (version "
            f"{weights.version}, rollout.parity_tolerance {tolerance:g}); the engine did not take the new weights, or "
            "its precision is far off"
        )
    return {"sync/mean_abs": gap, "sync/max_abs": gaps.max().item()}


def informative(group: Group) -> bool:
    """Say whether the samples of a prompt have different rewards, so that a group baseline leaves an advantage."""
    return len({trajectory.reward for trajectory in group}) > 1


def grouped(trajectories: Mapping[int, Trajectory], prompts: int, each: int) -> list[Group]:
    """Sort trajectories by place into the groups that are whole, in order."""
    places = [range(prompt * each, (prompt + 1) * each) for prompt in range(prompts)]
    return [[trajectories[p] for p in group] for group in places if all(p in trajectories for p in group)]


def permuted(trajectories: Sequence[Trajectory], seed: int, step: int) -> list[Trajectory]:
    """Shuffle the rewards among the trajectories: the control experiment of `reward.permute`."""
    rewards = [trajectory.reward for trajectory in trajectories]
    random.Random(seed * 1_000_003 + step).shuffle(rewards)
    return [replace(trajectory, reward=reward) for trajectory, reward in zip(trajectories, rewards, strict=True)]
