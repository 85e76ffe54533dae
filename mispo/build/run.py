"""Build a run from its config: the only place that knows which engine, reward or filter is meant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from mispo.collect import collect
from mispo.config.objective import objective
from mispo.config.schema import MispoConfig
from mispo.data.prompts import Data, build_data
from mispo.evaluation import Evaluator
from mispo.build.algorithm import build_method
from mispo.build.models import (
    add_adapters,
    build_critic,
    build_reference,
    build_rollout_engine,
    build_value_head,
    check_context,
    check_routers,
    keep_base,
    num_experts,
    open_policy,
    summary,
)
from mispo.monitor.alarms import Alarms
from mispo.monitor.console import StepPrinter, make_console
from model.facts import count_flops
from mispo.monitor.tracking import Tracker
from mispo.monitor.watchdog import Watchdog
from mispo.replay import replayed
from mispo.run import Run
from mispo.trainer.batch import Layout
from mispo.trainer.checkpoint.states import load_progress, load_states
from mispo.trainer.checkpoint.files import newest_checkpoint
from mispo.trainer.engine import TrainEngine, build_engines, start_ranks
from mispo.trainer.policy import ActorModule, CriticModule, checkpoint_layers, compute_dtype
from mispo.trainer.ranks import Ranks, max_memory_gb
from mispo.trainer.rehearsal import rehearse
from mispo.trainer.publish import NoSync, WeightSync
from mispo.warm_start.train import warm_start
from model.moe.balance import freeze_routers
from model.build import let_drafts_learn
from rewards.workers import RewardPool, RewardSpec
from mispo.trainer.history import WeightHistory
from rollouts.sampler import RolloutWorker

PROBES = 4
"""Prompts on which engine and trainer are compared after each weight sync."""

REPLAY = "replay of {} step{}: no engine, so no sampling, no weight sync, no evaluation"

WARM_START_LINES = 10
"""Lines that the warm start prints."""


def build_run(
    config: MispoConfig, directory: Path, *, resume: bool, replay: Sequence[Path] = (), tracked: bool = True
) -> Run:
    """Everything between the config and the first step. ValueError for what the user can mend.

    replay: files of trajectories that stand in for the rollout engine, one per step. tracked: write metrics.
    """
    disable_progress_bar()  # of saving and loading weights: it would tear the step lines
    checkpoint, torn = newest_checkpoint(directory / "checkpoints") if resume else (None, [])
    progress = load_progress(checkpoint) if checkpoint else None
    pool = RewardPool(
        RewardSpec(config.reward.name, config.data.task, config.reward.format_weight),
        config.reward.workers,
        config.reward.timeout_s,
    )
    try:
        accelerator, ranks = start_ranks(config.trainer)
        directory = ranks.agree(directory)
        printer = StepPrinter(config.trainer.steps, make_console()) if ranks.first else None
        say = printer.console.print if printer else _silent
        for problem in torn:
            say(f"left out: {problem}", highlight=False, markup=False, soft_wrap=True)
        policy, tokenizer = open_policy(config, directory, checkpoint)
        check_context(policy, config)
        check_routers(policy, config)
        data = build_data(config.data, tokenizer)
        policy.to(ranks.device)
        if checkpoint is None and config.warm_start.steps:
            _warm_start(policy, tokenizer, data, config, ranks, say)
        shared = config.algorithm.advantage == "gae" and config.critic.kind == "shared"
        dtype, layout = compute_dtype(config.trainer.dtype, ranks.device), _layout(config, ranks.device)
        critic = None if shared else build_critic(policy, tokenizer, config, checkpoint)
        reference = build_reference(policy, tokenizer, config, directory, ranks, dtype, resume=checkpoint is not None)
        engine = None if replay else build_rollout_engine(policy, tokenizer, config, ranks)
        # Now: adapters and ZeRO-3 change the shapes of the weights.
        flops = {"actor": count_flops(policy)} | ({"critic": count_flops(critic.backbone)} if critic else {})
        if config.model.lora.rank:
            if checkpoint is None and ranks.first:
                keep_base(policy, tokenizer, config, directory)
            add_adapters(policy, critic, config, dtype, checkpoint)
        let_drafts_learn(policy, config.trainer.mtp_weight > 0)
        if config.router.freeze:
            freeze_routers(policy)
        # Now: under ZeRO-3 the trainer's weights will have no shape.
        about, experts = summary(policy, config, ranks, dtype, layout), num_experts(policy)
        vocabulary = policy.config.get_text_config().vocab_size
        if config.trainer.gradient_checkpointing:
            for model in (policy, critic.backbone) if critic else (policy,):
                checkpoint_layers(model, config.trainer.zero_stage)
        actor_engine, critic_engine = build_engines(
            accelerator,
            ranks,
            ActorModule(
                policy,
                dtype,
                entropy_gradient=config.algorithm.entropy > 0,
                value_head=build_value_head(policy, config, checkpoint) if shared else None,
                replays=config.router.record or config.router.replay != "off",
                drafts=config.trainer.mtp_weight > 0,
            ),
            CriticModule(critic, dtype) if critic else None,
            config.trainer,
            flops,
        )
        sync: WeightSync | NoSync = NoSync()
        worker = None
        if engine is not None:
            sync = WeightSync(
                actor_engine,
                engine,
                WeightHistory(config.rollout.staleness),
                probe=_probe(data, config),
                packed=layout.packed,
                tolerance=config.rollout.parity_tolerance,
                temperature=config.rollout.temperature,
                exact=config.router.attribute_every > 0,
            )
            worker = RolloutWorker(
                engine,
                tokenizer,
                samples_per_prompt=config.rollout.samples_per_prompt,
                max_new_tokens=config.rollout.max_new_tokens,
                temperature=config.rollout.temperature,
                seed=config.seed,
            )
        _rehearse(actor_engine, critic_engine, config, layout, vocabulary, say)
        for trained in filter(None, (actor_engine, critic_engine)):
            trained.flops.take()
        if progress and checkpoint:
            assert isinstance(sync, WeightSync), "a replay is not resumed"
            load_states(checkpoint, progress, actor=actor_engine, critic=critic_engine, sync=sync)
            data.stream.cursor = progress.cursor
            if config.rollout.staleness and not sync.history.versions:
                sync.record()  # rollouts that were current until now begin to lag
            sync.publish()
        method, alarms = build_method(config), Alarms(config)
        if progress:
            method.filter.restore(progress.filter_state)
            alarms.seen = dict(progress.alarms_seen)
        tracker = None
        if ranks.first:
            if tracked:
                tracker = Tracker(
                    directory,
                    settings=config.tracking,
                    config=asdict(config),
                    resume_step=progress.step if progress else None,
                    wandb_id=progress.wandb_id if progress else None,
                )
            say(about, highlight=False, style="dim")
            if replay:
                say(REPLAY.format(len(replay), "" if len(replay) == 1 else "s"), highlight=False, style="dim")
            say(objective(config), highlight=False, markup=False, style="dim")
        return Run(
            config=config,
            directory=directory,
            start_step=progress.step if progress else 0,
            ranks=ranks,
            tokenizer=tokenizer,
            data=data,
            actor=actor_engine,
            critic=critic_engine,
            layout=layout,
            reference=reference,
            num_experts=experts,
            pool=pool,
            collect=replayed(replay, vocabulary) if replay else collect,
            worker=worker,
            sync=sync,
            method=method,
            alarms=alarms,
            watchdog=Watchdog(config.alarms.stall_s, f"rank {ranks.rank}"),
            evaluator=Evaluator(
                engine=engine,
                pool=pool,
                tokenizer=tokenizer,
                heldout=data.heldout if engine else [],
                ranks=ranks,
                task=config.data.task or Path(str(config.data.path)).stem,
                samples=config.eval.samples,
                max_new_tokens=config.rollout.max_new_tokens,
                temperature=config.rollout.temperature,
            ),
            tracker=tracker,
            printer=printer,
            resumed=progress is not None,
            last_checkpoint=checkpoint,
            step=progress.step if progress else 0,
            low_L=torch.tensor(progress.low_confidence) if progress and progress.low_confidence else None,
        )
    except BaseException:
        pool.close()
        raise


def _warm_start(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    config: MispoConfig,
    ranks: Ranks,
    say: Callable[..., None],
) -> None:
    """The first rank trains, the others take its weights and its place in the prompt stream."""
    steps = config.warm_start.steps
    every = max(1, steps // WARM_START_LINES)

    def on_step(step: int, loss: float) -> None:
        if step % every == 0 or step == steps:
            say(f"warm start {step:>4}/{steps}  loss {loss:.3f}", highlight=False)

    if ranks.first:
        warm_start(
            policy,
            tokenizer,
            data.stream,
            config.warm_start,
            task=config.data.task,
            seed=config.seed,
            on_step=on_step,
        )
    if ranks.size > 1:
        for tensor in policy.state_dict().values():
            dist.broadcast(tensor, src=0)
        cursor = torch.tensor(data.stream.cursor, device=ranks.device)
        dist.broadcast(cursor, src=0)
        data.stream.cursor = int(cursor)


def _layout(config: MispoConfig, device: torch.device) -> Layout:
    """How micro-batches are laid out. ValueError for an attention that this device does not have."""
    attention = config.model.attention
    by_blocks = attention not in ("sdpa", "eager")
    if by_blocks and device.type != "cuda":
        raise ValueError(f"model.attention: {attention} needs a CUDA device, this is {device.type}; use sdpa")
    packed = by_blocks if config.trainer.layout == "auto" else config.trainer.layout == "packed"
    return Layout(config.trainer.tokens_per_microbatch, packed)


def _rehearse(
    actor: TrainEngine,
    critic: TrainEngine | None,
    config: MispoConfig,
    layout: Layout,
    vocabulary: int,
    say: Callable[..., None],
) -> None:
    """The largest micro-batch there can be, before anything long has begun."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    seconds = sum(rehearse(engine, longest, layout, vocabulary) for engine in (actor, critic) if engine)
    say(
        f"worst case fits: {max(1, layout.tokens // longest)} × {longest} tokens forward and backward, "
        f"{seconds:.1f} s, peak memory {max_memory_gb(actor.ranks.device):.2f} GB",
        highlight=False,
        style="dim",
    )


def _probe(data: Data, config: MispoConfig) -> list[Tensor]:
    cursor = data.stream.cursor
    prompts = data.heldout[:PROBES] or data.stream.take(min(PROBES, config.rollout.prompts_per_step))
    data.stream.cursor = cursor
    return [prompt.ids for prompt in prompts]


def _silent(*_: object, **__: object) -> None:
    """Only the first rank talks."""
