"""Build the learner of a run: DeepSpeed engines, layout, packing, and the weights that it publishes."""

from __future__ import annotations

import torch
from torch import Tensor

from mispo.build.models import Models, Modules
from mispo.build.setup import Setup
from mispo.config.parts import SeparateCritic, SharedCritic, ValueCritic
from mispo.config.schema import MispoConfig
from mispo.data.prompts import Data
from mispo.trainer.batch import Layout, Packing
from mispo.trainer.engine import build_engines
from mispo.trainer.history import WeightHistory
from mispo.trainer.learner import Learner
from mispo.trainer.publish import Publisher
from mispo.trainer.ranks import max_memory_gb
from mispo.trainer.rehearsal import rehearse
from mispo.trainer.update import UpdateSettings
from rewards.shaping import overlong_penalty

PROBES = 4
"""Prompts on which engine and trainer are compared after each weight sync."""


def layout_of(config: MispoConfig, device: torch.device) -> Layout:
    """Decide how micro-batches are laid out. ValueError for an attention that this device does not support."""
    attention = config.model.attention
    by_blocks = attention not in ("sdpa", "eager")
    if by_blocks and device.type != "cuda":
        raise ValueError(f"model.attention: {attention} needs a CUDA device (is {device.type}); use sdpa")
    packed = by_blocks if config.trainer.layout == "auto" else config.trainer.layout == "packed"
    return Layout(config.trainer.tokens_per_microbatch, packed)


def build_learner(setup: Setup, models: Models, modules: Modules, layout: Layout, data: Data) -> Learner:
    """Put the modules under DeepSpeed, and rehearse the largest possible micro-batch."""
    config = setup.config
    actor, critic = build_engines(
        setup.accelerator,
        setup.ranks,
        modules.actor,
        modules.critic,
        config.trainer,
        config.optimizer,
        models.flops,
    )
    publisher = None
    if models.engine is not None:
        # Attribution needs exact old weights: rounding them would count as mismatch by stale weights.
        exact = config.router.attribute_every > 0
        publisher = Publisher(
            actor,
            WeightHistory(config.rollout.lag),
            probe=_probe(data, config),
            packed=layout.packed,
            temperature=config.rollout.temperature,
            convert=(lambda weights: weights) if exact else models.engine.converted,
        )
    chosen = config.critic
    learner = Learner(
        ranks=setup.ranks,
        actor=actor,
        critic=critic,
        reference=models.reference,
        publisher=publisher,
        packing=_packing(config),
        settings=_update_settings(config, layout),
        replays_old=config.router.replay == "old",
        critic_only_steps=chosen.warmup_steps if isinstance(chosen, SeparateCritic) else 0,
        bias_rate=config.router.bias_update_rate,
        num_experts=models.facts.experts,
    )
    _rehearse(setup, learner, models.facts.vocabulary)
    return learner


def _packing(config: MispoConfig) -> Packing:
    limit, overlong = config.rollout.max_new_tokens, config.algorithm.overlong

    def penalty(length: int) -> float:
        return overlong_penalty(length, limit, round(overlong.share * limit), overlong.penalty)

    return Packing(
        truncation=config.algorithm.truncation,
        prompts_per_step=config.rollout.prompts_per_step,
        samples_per_prompt=config.rollout.samples_per_prompt,
        penalty=penalty,
        replay=config.router.replay == "rollout",
    )


def _update_settings(config: MispoConfig, layout: Layout) -> UpdateSettings:
    critic = config.critic
    return UpdateSettings(
        layout=layout,
        seed=config.seed,
        temperature=config.rollout.temperature,
        actor_minibatches=config.trainer.actor_minibatches,
        critic_minibatches=config.trainer.critic_minibatches,
        value_clip=critic.value_clip if isinstance(critic, ValueCritic) else None,
        value_weight=critic.loss_weight if isinstance(critic, SharedCritic) else 1.0,
        mtp_weight=config.trainer.mtp_weight,
    )


def _rehearse(setup: Setup, learner: Learner, vocabulary: int) -> None:
    """Run the largest possible micro-batch, before anything long begins."""
    layout, ranks = learner.settings.layout, learner.ranks
    longest = setup.config.data.max_prompt_tokens + setup.config.rollout.max_new_tokens
    trained = [engine for engine in (learner.actor, learner.critic) if engine]
    seconds = sum(rehearse(engine, longest, layout, vocabulary) for engine in trained)
    setup.say(
        f"worst case fits: {max(1, layout.tokens // longest)} × {longest} tokens forward and backward, "
        f"{seconds:.1f} s, peak memory {max_memory_gb(ranks.device):.2f} GB",
        style="dim",
    )
    for engine in trained:
        engine.flops.take()


def _probe(data: Data, config: MispoConfig) -> list[Tensor]:
    cursor = data.stream.cursor
    prompts = data.heldout[:PROBES] or data.stream.take(min(PROBES, config.rollout.prompts_per_step))
    data.stream.cursor = cursor
    return [prompt.ids for prompt in prompts]
