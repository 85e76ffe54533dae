"""Build the models of a run: policy, critic, reference and the copy that samples.

The types fix the order: the warm start turns an `Opened` policy into a `Policy`; the copies in `Models` are made from
it while it is whole; `Modules` are what the trainer gets, with adapters added and parts frozen.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mispo.build.setup import Setup
from mispo.config.parts import Native, SeparateCritic, SharedCritic
from mispo.config.schema import RouterConfig
from mispo.data.prompts import PromptStream
from mispo.trainer.policy import ActorModule, CriticModule, Reference, checkpoint_layers, compute_dtype, copy_of
from mispo.warm_start.train import warm_start
from model.build import build_policy, let_drafts_learn
from model.critic import Critic, ValueHead
from model.facts import Facts, ForwardFlops, count_flops, facts_of
from model.lora import add_lora, load_trained
from model.moe.balance import freeze_routers, selection_biases
from model.moe.dispatch import experts_in_use
from model.moe.routers import find_routers, keep_router_fp32
from rollouts.engine import Engine
from rollouts.native.engine import NativeEngine

REPLAYED = {"rollout": "the rollout", "old": "π_old"}
"""Whose routing router.replay takes, in words."""

WARM_START_LINES = 10
"""Lines that the warm start prints."""


@dataclass(frozen=True)
class Opened:
    """The policy as it was opened and checked against the config: new, or from a checkpoint. With adapters it is always
    their base model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Policy:
    """The policy at the start of RL, on this rank's device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Models:
    """The policy and the models that were copied from it while it was whole. engine: None for saved rollouts. critic,
    value_head: one of them, or none."""

    policy: Policy
    engine: Engine | None
    critic: Critic | None
    value_head: ValueHead | None
    reference: Reference | None
    facts: Facts
    flops: Mapping[str, ForwardFlops]


@dataclass(frozen=True)
class Modules:
    """The modules for DeepSpeed. about: one line about the model and how it is computed."""

    actor: ActorModule
    critic: CriticModule | None
    about: str


def open_policy(setup: Setup) -> Opened:
    """Open the policy. ValueError for a model that cannot do what the config needs."""
    config = setup.config
    preset, path = config.model.preset, config.model.path
    if setup.checkpoint and config.model.lora.rank:
        preset, path = None, path if preset is None else str(setup.directory.base)
    elif setup.checkpoint:
        preset, path = None, str(setup.checkpoint / "actor")
    model, tokenizer = build_policy(
        preset,
        path,
        seed=config.seed,
        mtp=config.model.mtp,
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
    )
    _check_context(model, setup)
    _check_routers(model, setup)
    return Opened(model, tokenizer)


def _check_context(policy: PreTrainedModel, setup: Setup) -> None:
    """Raise ValueError if the longest trajectory has more tokens than the model has positions."""
    longest = setup.config.data.max_prompt_tokens + setup.config.rollout.max_new_tokens
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or longest
    if longest > positions:
        raise ValueError(
            f"rollout.max_new_tokens: with data.max_prompt_tokens a trajectory may have {longest} tokens, but the "
            f"model has {positions} positions; lower one of the two"
        )


def _check_routers(policy: PreTrainedModel, setup: Setup) -> None:
    """Raise ValueError for settings of routers, or of draft heads, if the model has none."""
    router, defaults = setup.config.router, RouterConfig()
    for name in ("replay", "freeze", "bias_update_rate"):
        if getattr(router, name) != getattr(defaults, name) and not find_routers(policy):
            raise ValueError(f"router.{name}: {type(policy).__name__} is dense and has no routers; leave it out")
    if router.bias_update_rate:
        selection_biases(policy)
    if setup.config.trainer.mtp_weight and getattr(policy, "mtp", None) is None:
        raise ValueError("trainer.mtp_weight: the model has no draft heads (model.mtp); set it to 0")


def warm_policy(setup: Setup, opened: Opened, stream: PromptStream) -> Policy:
    """Move the policy to this rank's device and run the warm start, if the run is new and has one.

    The first rank trains, the others take its weights and its place in the prompt stream.
    """
    ranks, settings = setup.ranks, setup.config.warm_start
    policy = Policy(placed(opened.model, ranks.device), opened.tokenizer)
    if setup.checkpoint is not None or not settings.steps:
        return policy
    every = max(1, settings.steps // WARM_START_LINES)

    def on_step(step: int, loss: float) -> None:
        if step % every == 0 or step == settings.steps:
            setup.say(f"warm start {step:>4}/{settings.steps}  loss {loss:.3f}")

    if ranks.first:
        task, seed = setup.config.data.task, setup.config.seed
        warm_start(policy.model, policy.tokenizer, stream, settings, task=task, seed=seed, on_step=on_step)
    if ranks.size > 1:
        for tensor in policy.model.state_dict().values():
            dist.broadcast(tensor, src=0)
        stream.cursor = ranks.agree(stream.cursor)
    return policy


def build_models(setup: Setup, policy: Policy, *, samples: bool) -> Models:
    """Build critic or value head, the reference, and an engine if the run samples."""
    config = setup.config
    chosen = config.critic
    critic = _critic(setup, policy, chosen) if isinstance(chosen, SeparateCritic) else None
    reference = _reference(setup, policy)
    facts = facts_of(policy.model)
    return Models(
        policy=policy,
        engine=_engine(setup, policy) if samples else None,
        critic=critic,
        value_head=_value_head(setup, policy, chosen) if isinstance(chosen, SharedCritic) else None,
        reference=reference,
        facts=facts,
        flops={"actor": facts.forward} | ({"critic": count_flops(critic.backbone)} if critic else {}),
    )


def _critic(setup: Setup, policy: Policy, chosen: SeparateCritic) -> Critic:
    """Build the value model: on a copy of the policy's backbone, or on another one (critic.model)."""
    config = setup.config
    if chosen.model is None:
        critic = Critic.from_policy(policy.model, chosen.head_init_std, config.seed)
    else:
        model = placed(_other_model("critic.model", chosen.model, setup, policy), policy.model.device)
        critic = Critic(model.get_decoder(), chosen.head_init_std, config.seed)
    if setup.checkpoint and not config.model.lora.rank:
        critic.load_state_dict(load_file(setup.checkpoint / "critic.safetensors"))
    return critic


def _value_head(setup: Setup, policy: Policy, chosen: SharedCritic) -> ValueHead:
    """Build the value head on the policy's trunk (critic=shared)."""
    head = ValueHead(policy.model, chosen.head_init_std, setup.config.seed)
    if setup.checkpoint:
        head.load_state_dict(load_file(setup.checkpoint / "critic.safetensors"))
    return head


def _reference(setup: Setup, policy: Policy) -> Reference | None:
    """Build the reference policy of the KL term (algorithm.kl); None without that term.

    Without algorithm.reference it is the policy at the start, kept in the run directory for a resumed run.
    """
    algorithm, kept = setup.config.algorithm, setup.directory.reference
    if algorithm.kl == 0:
        return None
    path = algorithm.reference or (str(kept) if setup.checkpoint else None)
    if path is None:
        model = copy.deepcopy(policy.model)
        if setup.ranks.first:
            model.save_pretrained(kept)
            policy.tokenizer.save_pretrained(kept)
    elif path == str(kept) and not kept.is_dir():
        raise ValueError(
            f"algorithm.kl: {kept} does not exist, since this run began without a KL term; set algorithm.reference"
        )
    else:
        model = _other_model("algorithm.reference", path, setup, policy)
    dtype = compute_dtype(setup.config.trainer.dtype, setup.ranks.device)
    return Reference(ActorModule(placed(model, setup.ranks.device), dtype), setup.ranks)


def _other_model(key: str, path: str, setup: Setup, policy: Policy) -> PreTrainedModel:
    """Open a second causal LM that reads the policy's tokens. ValueError that names the key for one that does not."""
    settings = setup.config.model
    try:
        model, tokenizer = build_policy(
            None, path, attention=settings.attention, trust_remote_code=settings.trust_remote_code
        )
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", key, 1)) from error
    if tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ValueError(f"{key}: {path} has another tokenizer than the policy")
    return model


def _engine(setup: Setup, policy: Policy) -> Engine:
    """Build an engine with a separate copy of the policy, in the rollout precision."""
    config, model, chosen = setup.config, policy.model, setup.config.engine
    assert isinstance(chosen, Native), f"no engine is built for {chosen.name}"
    attention = "eager" if model.config._attn_implementation == "eager" else "sdpa"  # takes the slot cache's masks
    copied = copy_of(model, model.state_dict(), setup.ranks.device, attention)
    placed(copied, setup.ranks.device, compute_dtype(config.rollout.dtype, setup.ranks.device))
    keep_router_fp32(copied)
    ends = model.generation_config.eos_token_id if model.generation_config else None
    end = policy.tokenizer.eos_token_id
    ends = [end] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return NativeEngine(
        copied,
        sorted({*ends, end}),
        policy.tokenizer.pad_token_id,
        chosen.slots,
        record_experts=config.router.record,
    )


def build_modules(setup: Setup, models: Models, *, packed: bool) -> Modules:
    """Put adapters on the models, freeze what does not learn, and wrap them for the trainer."""
    config, policy, critic = setup.config, models.policy.model, models.critic
    dtype = compute_dtype(config.trainer.dtype, setup.ranks.device)
    if config.model.lora.rank:
        _keep_base(setup, models.policy)
        _add_adapters(setup, models, dtype)
    let_drafts_learn(policy, config.trainer.mtp_weight > 0)
    if config.router.freeze:
        freeze_routers(policy)
    about = _about(setup, policy, dtype, packed=packed)
    if config.trainer.gradient_checkpointing:
        for model in (policy, critic.backbone) if critic else (policy,):
            checkpoint_layers(model, config.trainer.zero_stage)
    actor = ActorModule(
        policy,
        dtype,
        entropy_gradient=config.algorithm.entropy > 0,
        value_head=models.value_head,
        replays=config.router.record or config.router.replay != "off",
        drafts=config.trainer.mtp_weight > 0,
    )
    return Modules(actor, CriticModule(critic, dtype) if critic else None, about)


def _keep_base(setup: Setup, policy: Policy) -> None:
    """Save the base model of a new run's adapters, if it was made from a preset."""
    if setup.config.model.preset is not None and setup.checkpoint is None and setup.ranks.first:
        policy.model.save_pretrained(setup.directory.base)
        policy.tokenizer.save_pretrained(setup.directory.base)


def _add_adapters(setup: Setup, models: Models, dtype: torch.dtype) -> None:
    """Add low-rank adapters (model.lora), so that only they and the value head learn; load those of a checkpoint."""
    lora, policy, critic = setup.config.model.lora, models.policy.model, models.critic
    for backbone in (policy, critic.backbone) if critic else (policy,):
        add_lora(backbone, lora.rank, lora.alpha, lora.targets, dtype, setup.config.seed)
    if setup.checkpoint:
        load_trained(policy, load_file(setup.checkpoint / "adapters.safetensors"))
        if critic:
            load_trained(critic, load_file(setup.checkpoint / "critic.safetensors"))


def placed(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Move a model in place; the decorator of transformers' own `to` hides its type."""
    moving: nn.Module = model
    moving.to(device=device, dtype=dtype)
    return model


def _about(setup: Setup, policy: PreTrainedModel, dtype: torch.dtype, *, packed: bool) -> str:
    config, ranks = setup.config, setup.ranks
    count = sum(parameter.numel() for parameter in policy.parameters())
    experts = experts_in_use(policy)
    return (
        f"{type(policy).__name__} {count / 1e6:.2f} M parameters, {len(find_routers(policy))} MoE layers"
        f"{f' (experts: {experts})' if experts else ''}, {ranks.size} × {ranks.device.type}, "
        f"trainer {str(dtype).removeprefix('torch.')} ZeRO {config.trainer.zero_stage}"
        f"{', packed' if packed else ''}"
        f"{f', routing of {REPLAYED[config.router.replay]} replayed' if config.router.replay != 'off' else ''}"
        f"{', routers frozen' if config.router.freeze else ''}"
    )
