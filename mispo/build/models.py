"""The models of a run: what the policy must be, critic, reference, adapters, and the copy that samples."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mispo.config.schema import MispoConfig, RouterConfig
from mispo.trainer.batch import Layout
from mispo.trainer.policy import ActorModule, Reference, compute_dtype
from mispo.trainer.ranks import Ranks
from model.moe.balance import selection_biases
from model.build import build_policy
from model.critic import Critic, ValueHead
from model.moe.dispatch import experts_in_use
from model.lora import add_lora, load_trained
from model.moe.routers import find_routers, keep_router_fp32
from rollouts.native.engine import NativeEngine

REPLAYED = {"rollout": "the rollout", "old": "π_old"}
"""Whose routing router.replay takes, in words."""

BASE = "base"
"""Of a run with adapters on a preset: the model that they are put on."""


def open_policy(
    config: MispoConfig, directory: Path, checkpoint: Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy as the run begins with it: new, or of a checkpoint; with adapters always what they are put on."""
    preset, path = config.model.preset, config.model.path
    if checkpoint and config.model.lora.rank:
        preset, path = None, path if preset is None else str(directory / BASE)
    elif checkpoint:
        preset, path = None, str(checkpoint / "actor")
    return build_policy(
        preset,
        path,
        seed=config.seed,
        mtp=config.model.mtp,
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
    )


def keep_base(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: MispoConfig, directory: Path
) -> None:
    """Save what the adapters are put on in run_dir/base, if it is nowhere else."""
    if config.model.preset is not None:
        policy.save_pretrained(directory / BASE)
        tokenizer.save_pretrained(directory / BASE)


def add_adapters(
    policy: PreTrainedModel, critic: Critic | None, config: MispoConfig, dtype: torch.dtype, checkpoint: Path | None
) -> None:
    """From here on only low-rank adapters (model.lora) and the value head learn; with the values of a checkpoint."""
    lora = config.model.lora
    backbones = (policy, critic.backbone) if critic else (policy,)
    for backbone in backbones:
        add_lora(backbone, lora.rank, lora.alpha, lora.targets, dtype, config.seed)
    if checkpoint:
        load_trained(policy, load_file(checkpoint / "adapters.safetensors"))
        if critic:
            load_trained(critic, load_file(checkpoint / "critic.safetensors"))


def check_context(policy: PreTrainedModel, config: MispoConfig) -> None:
    """ValueError where the longest trajectory has more tokens than the model has positions."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or longest
    if longest > positions:
        raise ValueError(
            f"rollout.max_new_tokens: with data.max_prompt_tokens a trajectory may have {longest} tokens, but the "
            f"model has {positions} positions; lower one of the two"
        )


def check_routers(policy: PreTrainedModel, config: MispoConfig) -> None:
    """ValueError for settings of routers, or of draft heads, in a model without any."""
    router, defaults = config.router, RouterConfig()
    for name in ("replay", "freeze", "bias_update_rate"):
        if getattr(router, name) != getattr(defaults, name) and not find_routers(policy):
            raise ValueError(f"router.{name}: {type(policy).__name__} is dense, it has no routers; leave it out")
    if router.bias_update_rate:
        selection_biases(policy)
    if config.trainer.mtp_weight and getattr(policy, "mtp", None) is None:
        raise ValueError("trainer.mtp_weight: the model has no draft heads (model.mtp); set it to 0")


def build_critic(
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
    if checkpoint and not config.model.lora.rank:
        critic.load_state_dict(load_file(checkpoint / "critic.safetensors"))
    return critic


def build_value_head(policy: PreTrainedModel, config: MispoConfig, checkpoint: Path | None) -> ValueHead:
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


def build_reference(
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


def build_rollout_engine(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: MispoConfig, ranks: Ranks
) -> NativeEngine:
    """An engine with a copy of the policy of its own, in the rollout precision."""
    attention = "eager" if policy.config._attn_implementation == "eager" else "sdpa"  # takes the slot cache's masks
    model = another(policy, policy.state_dict(), ranks.device, attention)
    model.to(dtype=compute_dtype(config.rollout.dtype, ranks.device))
    keep_router_fp32(model)
    ends = policy.generation_config.eos_token_id if policy.generation_config else None
    ends = [tokenizer.eos_token_id] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return NativeEngine(
        model,
        sorted({*ends, tokenizer.eos_token_id}),
        tokenizer.pad_token_id,
        config.rollout.slots,
        record_experts=config.router.record,
    )


def another(
    policy: PreTrainedModel, weights: Mapping[str, Tensor], device: torch.device, attention: str
) -> PreTrainedModel:
    """A model of the policy's shape with these weights, in float32. The random numbers of the run go on untouched."""
    shape = copy.deepcopy(policy.config)
    shape._attn_implementation = attention
    with torch.random.fork_rng(), torch.device(device):
        model = type(policy)(shape)
    model.load_state_dict(dict(weights))
    keep_router_fp32(model)
    return model


def num_experts(policy: nn.Module) -> int:
    """Experts of a MoE layer, 0 for a dense model."""
    routers = find_routers(policy)
    return routers[0].module.weight.shape[0] if routers else 0


def summary(policy: PreTrainedModel, config: MispoConfig, ranks: Ranks, dtype: torch.dtype, layout: Layout) -> str:
    """One line about the model and how it is computed."""
    count = sum(parameter.numel() for parameter in policy.parameters())
    experts = experts_in_use(policy)
    return (
        f"{type(policy).__name__} {count / 1e6:.2f} M parameters, {len(find_routers(policy))} MoE layers"
        f"{f' (experts: {experts})' if experts else ''}, {ranks.size} × {ranks.device.type}, "
        f"trainer {str(dtype).removeprefix('torch.')} ZeRO {config.trainer.zero_stage}"
        f"{', packed' if layout.packed else ''}"
        f"{f', routing of {REPLAYED[config.router.replay]} replayed' if config.router.replay != 'off' else ''}"
        f"{', routers frozen' if config.router.freeze else ''}"
    )
