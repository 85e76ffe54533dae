"""Build a run from its config: the only place that knows which engine, reward or filter is meant."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from mispo.collect import collect
from mispo.config.objective import objective
from mispo.config.schema import MispoConfig
from mispo.data import Data, build_data
from mispo.evaluate import Evaluator
from mispo.method import build_method
from mispo.monitor.alarms import Alarms
from mispo.monitor.console import StepPrinter, make_console
from mispo.monitor.tracking import Tracker
from mispo.monitor.watchdog import Watchdog
from mispo.replay import replayed
from mispo.run import Run
from mispo.trainer.batch import Layout
from mispo.trainer.checkpoint import load_progress, load_states
from mispo.trainer.checkpoint_files import newest_checkpoint
from mispo.trainer.engine import TrainEngine, build_engines, start_ranks
from mispo.trainer.policy import ActorModule, CriticModule, Reference, checkpoint_layers, compute_dtype
from mispo.trainer.ranks import Ranks, max_memory_gb
from mispo.trainer.rehearsal import rehearse
from mispo.trainer.weights import NoSync, WeightSync
from mispo.warm_start import warm_start
from model.build import build_policy
from model.critic import Critic, ValueHead
from model.routing import find_routers, keep_router_fp32
from rewards.workers import RewardPool, RewardSpec
from rollouts.native import NativeEngine
from rollouts.staleness import WeightHistory
from rollouts.worker import RolloutWorker

PROBES = 4
"""Prompts on which engine and trainer are compared after each weight sync."""

REPLAY = "replay of {} step{}: no engine, so no sampling, no weight sync, no evaluation"

WARM_START_LINES = 10
"""Lines that the warm start prints."""


def build_run(config: MispoConfig, directory: Path, *, resume: bool, replay: Sequence[Path] = ()) -> Run:
    """Everything between the config and the first step. ValueError for what the user can mend.

    replay: files of trajectories that stand in for the rollout engine, one per step.
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
        policy, tokenizer = build_policy(
            None if checkpoint else config.model.preset,
            str(checkpoint / "actor") if checkpoint else config.model.path,
            seed=config.seed,
            attention=config.model.attention,
            trust_remote_code=config.model.trust_remote_code,
        )
        _check_context(policy, config)
        data = build_data(config.data, tokenizer)
        policy.to(ranks.device)
        if checkpoint is None and config.warm_start.steps:
            _warm_start(policy, tokenizer, data, config, ranks, say)
        shared = config.algorithm.advantage == "gae" and config.critic.kind == "shared"
        dtype, layout = compute_dtype(config.trainer.dtype, ranks.device), _layout(config, ranks.device)
        critic = None if shared else _critic(policy, tokenizer, config, checkpoint)
        reference = _reference(policy, tokenizer, config, directory, ranks, dtype, resume=checkpoint is not None)
        engine = None if replay else _rollout_engine(policy, tokenizer, config, ranks)
        # Now: under ZeRO-3 the trainer's weights will have no shape.
        about, experts = _summary(policy, config, ranks, dtype, layout), _num_experts(policy)
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
                value_head=_value_head(policy, config, checkpoint) if shared else None,
            ),
            CriticModule(critic, dtype) if critic else None,
            config.trainer,
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
        if progress and checkpoint:
            assert isinstance(sync, WeightSync), "a replay is not resumed"
            load_states(checkpoint, progress, actor=actor_engine, critic=critic_engine, sync=sync)
            data.stream.cursor = progress.cursor
            sync.publish()
        method, alarms = build_method(config), Alarms(config)
        if progress:
            method.filter.restore(progress.filter_state)
            alarms.seen = dict(progress.alarms_seen)
        tracker = None
        if ranks.first:
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
        )
    except BaseException:
        pool.close()
        raise


def _check_context(policy: PreTrainedModel, config: MispoConfig) -> None:
    """ValueError where the longest trajectory has more tokens than the model has positions."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or longest
    if longest > positions:
        raise ValueError(
            f"rollout.max_new_tokens: with data.max_prompt_tokens a trajectory may have {longest} tokens, but the "
            f"model has {positions} positions; lower one of the two"
        )


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


def _critic(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: MispoConfig, checkpoint: Path | None
) -> Critic | None:
    """The value model of methods that have one."""
    if config.algorithm.advantage != "gae":
        return None
    if config.critic.model is None:
        critic = Critic.from_policy(policy, config.critic.head_init_std, config.seed)
    else:
        model = _other_model("critic.model", config.critic.model, tokenizer, config).to(policy.device)
        critic = Critic(model.get_decoder(), config.critic.head_init_std, config.seed)
    if checkpoint:
        critic.load_state_dict(load_file(checkpoint / "critic.safetensors"))
    return critic


def _value_head(policy: PreTrainedModel, config: MispoConfig, checkpoint: Path | None) -> ValueHead:
    """V on the policy's own trunk (critic.kind: shared)."""
    head = ValueHead(policy, config.critic.head_init_std, config.seed)
    if checkpoint:
        head.load_state_dict(load_file(checkpoint / "critic.safetensors"))
    return head


def _other_model(key: str, path: str, tokenizer: PreTrainedTokenizerBase, config: MispoConfig) -> PreTrainedModel:
    """A second causal LM that reads the policy's tokens. ValueError that names the key for one that does not."""
    settings = config.model
    try:
        model, other = build_policy(
            None, path, attention=settings.attention, trust_remote_code=settings.trust_remote_code
        )
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", key, 1)) from error
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{key}: {path} has another tokenizer than the policy")
    return model


def _reference(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: MispoConfig,
    directory: Path,
    ranks: Ranks,
    dtype: torch.dtype,
    *,
    resume: bool,
) -> Reference | None:
    """The policy that algorithm.kl holds the actor near to, None without that term.

    Without algorithm.reference it is the policy at the start, kept in run_dir/reference for a resumed run.
    """
    if config.algorithm.kl == 0:
        return None
    kept = directory / "reference"
    path = config.algorithm.reference or (str(kept) if resume else None)
    if path is None:
        model = copy.deepcopy(policy)
        if ranks.first:
            model.save_pretrained(kept)
            tokenizer.save_pretrained(kept)
    elif path == str(kept) and not kept.is_dir():
        raise ValueError(
            f"algorithm.kl: {kept} does not exist, since this run began without a KL term; name algorithm.reference"
        )
    else:
        model = _other_model("algorithm.reference", path, tokenizer, config)
    return Reference(ActorModule(model.to(ranks.device), dtype), ranks)


def _layout(config: MispoConfig, device: torch.device) -> Layout:
    """How micro-batches are laid out. ValueError for an attention that this device does not have."""
    attention = config.model.attention
    by_blocks = attention not in ("sdpa", "eager")
    if by_blocks and device.type != "cuda":
        raise ValueError(f"model.attention: {attention} needs a CUDA device, this is {device.type}; use sdpa")
    packed = by_blocks if config.trainer.layout == "auto" else config.trainer.layout == "packed"
    return Layout(config.trainer.tokens_per_microbatch, packed)


def _rollout_engine(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: MispoConfig, ranks: Ranks
) -> NativeEngine:
    """An engine with a copy of the policy of its own, in the rollout precision."""
    shape = copy.deepcopy(policy.config)
    if shape._attn_implementation != "eager":
        shape._attn_implementation = "sdpa"  # takes the masks of the slot cache
    with torch.device(ranks.device):
        model = type(policy)(shape)
    model.load_state_dict(policy.state_dict())
    model.to(device=ranks.device, dtype=compute_dtype(config.rollout.dtype, ranks.device))
    keep_router_fp32(model)
    ends = policy.generation_config.eos_token_id if policy.generation_config else None
    ends = [tokenizer.eos_token_id] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return NativeEngine(model, sorted({*ends, tokenizer.eos_token_id}), tokenizer.pad_token_id, config.rollout.slots)


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


def _num_experts(policy: nn.Module) -> int:
    """Experts of a MoE layer, 0 for a dense model."""
    routers = find_routers(policy)
    return routers[0].module.weight.shape[0] if routers else 0


def _summary(policy: nn.Module, config: MispoConfig, ranks: Ranks, dtype: torch.dtype, layout: Layout) -> str:
    count = sum(parameter.numel() for parameter in policy.parameters())
    experts = sorted({type(m).__name__ for name, m in policy.named_modules() if name.endswith(".experts")})
    return (
        f"{type(policy).__name__} {count / 1e6:.2f} M parameters, {len(find_routers(policy))} MoE layers"
        f"{' (' + ', '.join(experts) + ')' if experts else ''}, {ranks.size} × {ranks.device.type}, "
        f"trainer {str(dtype).removeprefix('torch.')} ZeRO {config.trainer.zero_stage}"
        f"{', packed' if layout.packed else ''}"
    )


def _silent(*_: object, **__: object) -> None:
    """Only the first rank talks."""
