"""`mispo train --dry-run`: what would run, with the arithmetic of its batches and its memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mispo.config.load import changed_keys
from mispo.config.objective import objective
from mispo.config.schema import MispoConfig
from mispo.monitor.console import make_console
from mispo.trainer.logprob import CHUNK_BYTES
from mispo.trainer.policy import compute_dtype
from model.build import let_drafts_learn
from model.moe.routers import find_routers, smallest_integer
from model.presets import preset_config
from model.step.step import StepForCausalLM
from model.tokenizer import character_tokenizer

UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def print_plan(config: MispoConfig, directory: Path) -> None:
    """The resolved config, what differs from the defaults, the objective, batch arithmetic, memory plan."""
    console = make_console()
    console.print(OmegaConf.to_yaml(OmegaConf.structured(config)), markup=False, highlight=False)
    _section(console, "Not the default", [(key, str(value)) for key, value in changed_keys(config).items()])
    console.print(f"{objective(config)}\n", highlight=False, markup=False, soft_wrap=True)
    _section(console, "Batches", batch_arithmetic(config))
    _section(console, "Memory per rank", memory_plan(config))
    console.print(f"would write to {directory}", markup=False, highlight=False, soft_wrap=True)


def batch_arithmetic(config: MispoConfig) -> list[tuple[str, str]]:
    """How prompts become trajectories, mini-batches and updates."""
    rollout, trainer = config.rollout, config.trainer
    total = rollout.prompts_per_step * rollout.samples_per_prompt
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    rows = [
        (
            "trajectories per step",
            f"{rollout.prompts_per_step} prompts × {rollout.samples_per_prompt} = {total}",
        )
    ]
    parts_of = {"actor": trainer.actor_minibatches}
    if config.algorithm.advantage == "gae" and config.critic.kind == "separate":
        parts_of["critic"] = trainer.critic_minibatches
    for name, parts in parts_of.items():
        small, large = total // parts, -(-total // parts)
        each = str(small) if small == large else f"{small} or {large}"
        rows.append((f"{name} mini-batches", f"{parts} of {each} trajectories, each used once"))
    rows.append(("longest trajectory", f"{longest} tokens"))
    rows.append(
        (
            "micro-batch",
            f"{trainer.tokens_per_microbatch} tokens ≥ {trainer.tokens_per_microbatch // longest} of those",
        )
    )
    rows.append(("steps", f"{trainer.steps} = {trainer.steps * trainer.actor_minibatches} actor updates at most"))
    return rows


def memory_plan(config: MispoConfig) -> list[tuple[str, str]]:
    """Bytes per rank: states exactly, activations as a rough upper bound of the logits alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        shape = _shape(config)
    except (OSError, ValueError) as error:
        if config.model.preset is not None:
            raise
        return [("unknown", f"the model's configuration does not open: {str(error).splitlines()[0]}")]
    with torch.device("meta"):
        model = StepForCausalLM(shape) if config.model.preset else AutoModelForCausalLM.from_config(shape)
    let_drafts_learn(model, config.trainer.mtp_weight > 0)
    count = sum(parameter.numel() for parameter in model.parameters())
    stage, rank = config.trainer.zero_stage, config.model.lora.rank
    learning, states = _learning(model, config)
    frozen = count * compute_dtype(config.trainer.dtype, device).itemsize if rank else 4 * (count - learning)
    weights, grads, optimizer = (
        bytes_ / (ranks if stage >= first else 1)
        for bytes_, first in ((4 * learning + frozen, 3), (4 * learning, 2), (states, 1))
    )
    rollout_bytes = compute_dtype(config.rollout.dtype, device).itemsize
    # Attribution takes the difference of weights for what it is, not for rounding; and computes with a copy.
    attributes = config.router.attribute_every > 0 and config.rollout.staleness > 0
    kept_bytes = 4 if attributes else rollout_bytes
    text = shape.get_text_config()
    tokens = config.trainer.tokens_per_microbatch
    separate = config.algorithm.advantage == "gae" and config.critic.kind == "separate"
    trained = ["actor", "critic"] if separate else ["actor"]
    hosted = {"none": 0.0, "optimizer": optimizer, "parameters": optimizer + weights}[config.trainer.offload]
    on_device = len(trained) * (weights + grads + optimizer - hosted)
    named = {"adamw": "Adam", "muon": "Muon"}[config.trainer.optimizer]
    parts = f"fp32 weights, gradients, {named}" if not rank else f"frozen weights; adapters, gradients, {named}"
    reference = [("reference policy", f"{size(4 * count)} (algorithm.kl, a whole copy)")] if config.algorithm.kl else []
    routers = find_routers(model)
    recorded = []
    if routers and config.router.record:
        item = smallest_integer(routers[0].module.weight.shape[0]).itemsize
        each = len(routers) * text.num_experts_per_tok * item
        longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
        most = each * longest * config.rollout.prompts_per_step * config.rollout.samples_per_prompt / ranks
        recorded = [
            ("experts of the rollout", f"{each} bytes a token, at most {size(most)} on the host (router.record)")
        ]
    return [
        ("parameters", f"{number(count)}{', and about as many again for the critic' if separate else ''}"),
        *([("adapters", f"{learning / 1e6:.2f} M parameters per model (model.lora.rank {rank})")] if rank else []),
        (" + ".join(trained), f"{size(on_device)} ({parts})"),
        *([("on the host", f"{size(len(trained) * hosted)} (trainer.offload)")] if hosted else []),
        *reference,
        ("rollout copy", f"{size(count * rollout_bytes)}"),
        ("rollout KV cache", f"{size(_cache_bytes(config, text, rollout_bytes))} for {config.rollout.slots} slots"),
        *recorded,
        *([("attribution", f"{size(4 * count)} (router.attribute_every, a copy for the while)")] if attributes else []),
        ("logits", f"{size(3 * min(tokens * text.vocab_size * 4, CHUNK_BYTES))} (of one chunk, softmax and gradient)"),
        ("old weights", f"{size((config.rollout.staleness + 1) * count * kept_bytes)} (rollout.staleness)")
        if config.rollout.staleness
        else ("old weights", "none"),
    ]  # fmt: skip


def _learning(model: PreTrainedModel, config: MispoConfig) -> tuple[int, int]:
    """Parameters that learn, and bytes of their optimizer's states."""
    lora = config.model.lora
    if lora.rank:
        layers = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and module.weight.requires_grad
            and (any(name.endswith(target) for target in lora.targets) if lora.targets else name != "lm_head")
        ]
        count = sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers)
        return count, count * (4 if config.trainer.optimizer == "muon" else 8)
    ends = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings())}
    learning = [p for p in model.parameters() if p.requires_grad]
    hidden = sum(p.numel() for p in learning if p.ndim >= 2 and id(p) not in ends)
    count = sum(p.numel() for p in learning)
    return count, 8 * count - (4 * hidden if config.trainer.optimizer == "muon" else 0)


def number(count: int) -> str:
    """Parameters for people: 1.73 M, 197 B."""
    return f"{count / 1e9:.4g} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def size(count: float) -> str:
    """Bytes for people: 1.50 GiB, 12.0 MiB."""
    unit, name = next((pair for pair in UNITS if count >= pair[0]), UNITS[-1])
    return f"{count / unit:.3g} {name}"


def _shape(config: MispoConfig) -> PreTrainedConfig:
    if config.model.preset is None:
        return AutoConfig.from_pretrained(str(config.model.path), trust_remote_code=config.model.trust_remote_code)
    tokenizer = character_tokenizer()
    return preset_config(
        config.model.preset,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        mtp=config.model.mtp,
    )


def _cache_bytes(config: MispoConfig, shape: Any, item: int) -> float:
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    kinds = getattr(shape, "layer_types", None) or ["full_attention"] * shape.num_hidden_layers
    cells = sum(min(longest, shape.sliding_window) if kind == "sliding_attention" else longest for kind in kinds)
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return 2.0 * cells * shape.num_key_value_heads * head * item * config.rollout.slots


def _section(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    console.print(table, highlight=False, markup=False)
    console.print()
