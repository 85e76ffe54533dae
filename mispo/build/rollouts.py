"""What samples and grades: reward workers, sampler, evaluation, attribution."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from mispo.build.models import Models
from mispo.build.setup import Setup
from mispo.collect import collect
from mispo.config.schema import MispoConfig
from mispo.data.prompts import Data
from mispo.evaluation import Evaluator
from mispo.metrics.attribution import Attributor
from mispo.replay import replayed
from mispo.system.interrupt import Interrupt
from mispo.trainer.learner import Learner
from mispo.trainer.ranks import Ranks
from rewards.workers import RewardPool, RewardSpec
from rollouts.engine import Engine
from rollouts.sampler import RolloutWorker, Sampler, Taken, Weights, publish
from rollouts.trajectory import Trajectory


def build_pool(config: MispoConfig) -> RewardPool:
    """Start the processes that grade."""
    return RewardPool(
        RewardSpec(config.reward.name, config.data.task, config.reward.format_weight),
        config.reward.workers,
        config.reward.timeout_s,
    )


@dataclass
class WorkerSampler:
    config: MispoConfig
    data: Data
    ranks: Ranks
    pool: RewardPool
    worker: RolloutWorker
    interrupt: Interrupt
    clock: Callable[[str], AbstractContextManager[None]]

    def take(self, step: int) -> Taken:
        return Taken(*collect(self, step, self.clock))

    def permute(self, trajectories: list[Trajectory], step: int) -> list[Trajectory]:
        if not self.config.reward.permute:
            return trajectories
        rewards = [t.reward for t in trajectories]
        random.Random(self.config.seed * 1_000_003 + step).shuffle(rewards)
        return [replace(t, reward=reward) for t, reward in zip(trajectories, rewards, strict=True)]

    def publish(self, weights: Weights | None) -> dict[str, float]:
        assert weights is not None
        rollout = self.config.rollout
        return publish(self.worker.engine, weights, rollout.parity_tolerance, rollout.temperature)

    def close(self) -> None:
        self.pool.close()


@dataclass
class FileSampler:
    take_step: Callable[..., tuple[list[Trajectory], dict[str, float]]]
    ranks: Ranks
    config: MispoConfig
    pool: RewardPool
    clock: Callable[[str], AbstractContextManager[None]]

    def take(self, step: int) -> Taken:
        return Taken(*self.take_step(self, step, self.clock))

    def publish(self, weights: Weights | None) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.pool.close()


def build_sampler(
    setup: Setup,
    models: Models,
    data: Data,
    pool: RewardPool,
    saved: Sequence[Path],
    *,
    clock: Callable[[str], AbstractContextManager[None]],
    interrupt: Interrupt,
) -> Sampler:
    config = setup.config
    if models.engine is None:
        return FileSampler(replayed(saved, models.vocabulary), setup.ranks, config, pool, clock)
    worker = RolloutWorker(
        models.engine,
        models.policy.tokenizer,
        samples_per_prompt=config.rollout.samples_per_prompt,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        seed=config.seed,
    )
    return WorkerSampler(config, data, setup.ranks, pool, worker, interrupt, clock)


def build_evaluator(setup: Setup, models: Models, data: Data, pool: RewardPool) -> Evaluator:
    config = setup.config
    engine: Engine | None = models.engine
    return Evaluator(
        engine=engine,
        pool=pool,
        tokenizer=models.policy.tokenizer,
        heldout=data.heldout if engine else [],
        ranks=setup.ranks,
        task=config.data.task or Path(str(config.data.path)).stem,
        samples=config.eval.samples,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        traces=config.eval.traces,
        toy=config.data.task,
        permuted=config.reward.permute,
    )


def build_attributor(setup: Setup, models: Models, learner: Learner) -> Attributor | None:
    """Build what measures where the mismatch comes from; None where nothing is sampled."""
    if models.engine is None:
        return None
    config = setup.config
    low, high = config.algorithm.filter.trajectory_bounds
    return Attributor(
        engine=models.engine,
        learner=learner,
        trajectories=config.router.attribute_trajectories,
        recorded=config.router.record,
        replaying=config.router.replay == "rollout",
        bounds=(low, high),
    )
