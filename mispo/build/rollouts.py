"""Build what samples and grades: reward workers, sampler, evaluator, attributor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from mispo.build.models import Models, Opened
from mispo.build.setup import Setup
from mispo.config import parts
from mispo.config.schema import MispoConfig
from mispo.data.prompts import Data
from mispo.evaluation import EvalSet, Evaluator, Measure, References, build_sets, constant_guess
from mispo.metrics.attribution import Attributor
from mispo.system.interrupt import Interrupt
from mispo.trainer.learner import Learner
from mispo.warm_start.traces import careful_reference
from rewards.pool import RewardPool
from rewards.registry import PartSpec, RewardSpec
from rollouts.environment import Environment
from rollouts.environments.single_turn import SingleTurn
from rollouts.episodes import Sampling
from rollouts.sampler import Sampler, StepSettings, SynchronousSampler
from rollouts.saved import SavedSampler

PERMUTED = "Control experiment: the rewards were shuffled within each step."


def build_pool(config: MispoConfig) -> RewardPool:
    """Start the processes that grade."""
    terms = {name: PartSpec(part.name, part.weight) for name, part in config.reward.parts.items()}
    return RewardPool(RewardSpec(terms, config.data.task), config.reward.workers, config.reward.timeout_s)


def build_environment(chosen: parts.EnvironmentPart) -> Environment:
    """Build the chosen environment (environment)."""
    assert isinstance(chosen, parts.SingleTurn), f"no environment is built for {chosen}"
    return SingleTurn()


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
    """Build the sampler of a step's trajectories: from an engine, or from the files of another run."""
    rollout, algorithm, ranks = setup.config.rollout, setup.config.algorithm, setup.ranks
    if models.engine is None:
        pool.close()  # saved trajectories have their rewards
        prompts, samples = rollout.prompts_per_step, rollout.samples_per_prompt
        return SavedSampler(saved, prompts, samples, models.facts.vocabulary, ranks, clock)
    settings = StepSettings(
        prompts_per_step=rollout.prompts_per_step,
        sampling=Sampling(
            samples_per_prompt=rollout.samples_per_prompt,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            seed=setup.config.seed,
        ),
        permute=setup.config.reward.permute,
        max_rounds=algorithm.max_rounds if algorithm.dynamic_sampling else None,
        parity_tolerance=rollout.parity_tolerance,
    )
    return SynchronousSampler(
        engine=models.engine,
        environment=build_environment(setup.config.environment),
        prompts=data.stream.take,
        grader=pool,
        tokenizer=models.policy.tokenizer,
        settings=settings,
        peers=ranks,
        asked=lambda: interrupt.asked,
        clock=clock,
    )


def open_sets(config: MispoConfig, data: Data, opened: Opened) -> list[EvalSet]:
    """Open the evaluation sets. ValueError that names the setting of one that does not open."""
    return build_sets(
        data,
        config.eval.sets,
        opened.tokenizer,
        samples=config.eval.samples,
        seed=config.data.seed,
        max_prompt_tokens=config.data.max_prompt_tokens,
    )


def build_evaluator(setup: Setup, models: Models, data: Data, sets: Sequence[EvalSet], pool: RewardPool) -> Evaluator:
    """Build what measures accuracy; without an engine it measures nothing."""
    config = setup.config
    references: list[Measure] = [constant_guess, careful_reference(config.data.task, data.heldout)]
    if config.reward.permute:
        references.append(lambda _: References(notes=[PERMUTED]))
    return Evaluator(
        engine=models.engine,
        environment=build_environment(config.environment),
        pool=pool,
        tokenizer=models.policy.tokenizer,
        ranks=setup.ranks,
        sets=sets if models.engine else (),
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        traces=config.eval.traces,
        references=references,
    )


def build_attributor(setup: Setup, models: Models, learner: Learner) -> Attributor | None:
    """Build the attributor of the mismatch to its causes; None where nothing is sampled."""
    if models.engine is None:
        return None
    config = setup.config
    return Attributor(
        engine=models.engine,
        learner=learner,
        trajectories=config.router.attribute_trajectories,
        recorded=config.router.record and models.engine.can.experts and models.engine.can.replay,
        replaying=config.router.replay == "rollout",
    )
