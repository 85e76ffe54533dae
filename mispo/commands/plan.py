"""`mispo train --dry-run`: what would run, with the arithmetic of its batches and its memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from mispo.config.formula import formula
from mispo.config.load import changed_keys
from mispo.config.parts import Native, SeparateCritic
from mispo.config.schema import MispoConfig
from mispo.monitor.console import make_console
from mispo.trainer.logprob import CHUNK_BYTES
from mispo.trainer.policy import compute_dtype
from model.build import build_shape, let_drafts_learn
from model.facts import Facts, facts_of
from model.lora import adapter_parameters

UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True)
class Batches:
    """Count what a step samples and how it is cut.

    minibatches: of each trained model, by its name. longest: tokens of the longest trajectory. microbatch: tokens.
    """

    prompts: int
    samples: int
    minibatches: dict[str, int]
    longest: int
    microbatch: int
    steps: int

    @property
    def trajectories(self) -> int:
        """Trajectories of a step, over all ranks."""
        return self.prompts * self.samples

    @property
    def actor_updates(self) -> int:
        """Actor updates of the whole run, at most."""
        return self.steps * self.minibatches["actor"]


@dataclass(frozen=True)
class Memory:
    """Count bytes per rank; 0 for what the run does not have.

    weights, gradients, optimizer: of all trained models together. on_host: what of these lies in the host's memory.
    rollout_copy, kv_cache: the rollout engine. logits: of one chunk, with softmax and gradient, a rough upper bound of
    the activations. reference: policy of algorithm.kl. old_weights: kept for rollouts that lag. recorded_experts: of a
    step's rollouts at most, on the host. attribution: a copy while it is computed.
    """

    weights: float
    gradients: float
    optimizer: float
    on_host: float
    rollout_copy: int
    kv_cache: int
    logits: int
    reference: int
    old_weights: int
    recorded_experts: float
    attribution: int

    @property
    def on_device(self) -> float:
        """Weights, gradients and optimizer states that stay on the device."""
        return self.weights + self.gradients + self.optimizer - self.on_host


@dataclass(frozen=True)
class Plan:
    """Hold the numbers of a run before it starts.

    facts, memory: None where the model's configuration does not open, for the reason in `problem`.
    adapters: parameters of the adapters on each model, 0 without.
    """

    batches: Batches
    facts: Facts | None = None
    adapters: int = 0
    memory: Memory | None = None
    problem: str = ""


def _minibatches(config: MispoConfig) -> dict[str, int]:
    """Read how many mini-batches each trained model has."""
    separate = isinstance(config.critic, SeparateCritic)
    critic = {"critic": config.trainer.critic_minibatches} if separate else {}
    return {"actor": config.trainer.actor_minibatches} | critic


def native_slots(config: MispoConfig) -> int:
    """Return how many sequences the native engine decodes at once; other engines have no cache of ours."""
    return config.engine.slots if isinstance(config.engine, Native) else 0


def plan_of(config: MispoConfig, ranks: int, device: torch.device) -> Plan:
    """Do the arithmetic of a run on so many ranks with such a device. ValueError for an unknown preset."""
    batches = Batches(
        prompts=config.rollout.prompts_per_step,
        samples=config.rollout.samples_per_prompt,
        minibatches=_minibatches(config),
        longest=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        microbatch=config.trainer.tokens_per_microbatch,
        steps=config.trainer.steps,
    )
    settings = config.model
    try:
        model = build_shape(
            settings.preset, settings.path, mtp=settings.mtp, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError) as error:
        if settings.preset is not None:
            raise
        return Plan(batches, problem=str(error).splitlines()[0])
    let_drafts_learn(model, config.trainer.mtp_weight > 0)
    facts = facts_of(model)
    adapters = adapter_parameters(model, settings.lora.rank, settings.lora.targets) if settings.lora.rank else 0
    return Plan(batches, facts, adapters, _memory(config, batches, facts, adapters, ranks, device))


def _memory(
    config: MispoConfig, batches: Batches, facts: Facts, adapters: int, ranks: int, device: torch.device
) -> Memory:
    weights, gradients, optimizer = _states(config, facts, adapters, ranks, device)
    copies = len(batches.minibatches)
    hosted = {"none": 0.0, "optimizer": optimizer, "parameters": optimizer + weights}[config.trainer.offload]
    rollout_item = compute_dtype(config.rollout.dtype, device).itemsize
    lag = config.rollout.lag
    # Attribution must not take rounding for a difference of weights, so it needs the old ones in float32; and it
    # computes with a copy.
    attributes = config.router.attribute_every > 0 and lag > 0
    record = facts.expert_bytes * batches.longest * batches.trajectories if config.router.record else 0
    return Memory(
        weights=copies * weights,
        gradients=copies * gradients,
        optimizer=copies * optimizer,
        on_host=copies * hosted,
        rollout_copy=facts.parameters * rollout_item,
        kv_cache=facts.kv_bytes(batches.longest, rollout_item) * native_slots(config),
        logits=3 * min(4 * batches.microbatch * facts.vocabulary, CHUNK_BYTES),
        reference=4 * facts.parameters if config.algorithm.kl else 0,
        old_weights=(lag + 1) * facts.parameters * (4 if attributes else rollout_item) if lag else 0,
        recorded_experts=record / ranks,
        attribution=4 * facts.parameters if attributes else 0,
    )


def _states(
    config: MispoConfig, facts: Facts, adapters: int, ranks: int, device: torch.device
) -> tuple[float, float, float]:
    """Bytes per rank of one model's weights, gradients and optimizer states, as ZeRO divides them."""
    if config.model.lora.rank:
        learning, matrices = adapters, adapters
        frozen = facts.parameters * compute_dtype(config.trainer.dtype, device).itemsize
    else:
        learning, matrices = facts.learning, facts.matrices
        frozen = 4 * (facts.parameters - learning)
    states = config.optimizer.state_bytes(matrices, learning - matrices)
    weights, gradients, optimizer = (
        whole / (ranks if config.trainer.zero_stage >= first else 1)
        for whole, first in ((4 * learning + frozen, 3), (4 * learning, 2), (states, 1))
    )
    return weights, gradients, optimizer


def print_plan(config: MispoConfig, directory: Path) -> None:
    """Print the resolved config, what differs from the defaults, the objective, batch arithmetic and memory plan."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = plan_of(config, int(os.environ.get("WORLD_SIZE", "1")), device)
    console = make_console()
    console.print(OmegaConf.to_yaml(OmegaConf.structured(config)), markup=False, highlight=False)
    _section(console, "Not the default", [(key, str(value)) for key, value in changed_keys(config).items()])
    console.print(f"{formula(config)}\n", highlight=False, markup=False, soft_wrap=True)
    _section(console, "Batches", batch_rows(plan.batches))
    _section(console, "Memory per rank", memory_rows(plan, config))
    console.print(f"would write to {directory}", markup=False, highlight=False, soft_wrap=True)


def batch_rows(batches: Batches) -> list[tuple[str, str]]:
    """Word how prompts become trajectories, mini-batches and updates."""
    total = batches.trajectories
    rows = [("trajectories per step", f"{batches.prompts} prompts × {batches.samples} = {total}")]
    for name, parts in batches.minibatches.items():
        small, large = total // parts, -(-total // parts)
        each = str(small) if small == large else f"{small} or {large}"
        rows.append((f"{name} mini-batches", f"{parts} of {each} trajectories, each used once"))
    fitting = batches.microbatch // batches.longest
    return [
        *rows,
        ("longest trajectory", f"{batches.longest} tokens"),
        ("micro-batch", f"{batches.microbatch} tokens ≥ {fitting} of those"),
        ("steps", f"{batches.steps} = {batches.actor_updates} actor updates at most"),
    ]


def memory_rows(plan: Plan, config: MispoConfig) -> list[tuple[str, str]]:
    """Word the bytes per rank. config: of the plan, for the names of its settings."""
    facts, memory, trained = plan.facts, plan.memory, list(plan.batches.minibatches)
    if facts is None or memory is None:
        return [("unknown", f"the model's configuration does not open: {plan.problem}")]
    rank, title = config.model.lora.rank, config.optimizer.title
    again = ", and about as many again for the critic" if "critic" in trained else ""
    parts = f"frozen weights; adapters, gradients, {title}" if rank else f"fp32 weights, gradients, {title}"
    rows = [
        ("parameters", f"{number(facts.parameters)}{again}"),
        ("adapters", rank and f"{plan.adapters / 1e6:.2f} M parameters per model (model.lora.rank {rank})"),
        (" + ".join(trained), f"{size(memory.on_device)} ({parts})"),
        ("on the host", memory.on_host and f"{size(memory.on_host)} (trainer.offload)"),
        ("reference policy", memory.reference and f"{size(memory.reference)} (algorithm.kl, a whole copy)"),
        ("rollout copy", size(memory.rollout_copy)),
        ("rollout KV cache", f"{size(memory.kv_cache)} for {native_slots(config)} slots"),
        (
            "experts of the rollout",
            memory.recorded_experts
            and f"{facts.expert_bytes} bytes a token, at most {size(memory.recorded_experts)} on the host "
            "(router.record)",
        ),
        (
            "attribution",
            memory.attribution and f"{size(memory.attribution)} (router.attribute_every, a copy for the while)",
        ),
        ("logits", f"{size(memory.logits)} (of one chunk, softmax and gradient)"),
        ("old weights", f"{size(memory.old_weights)} (rollout.lag)" if memory.old_weights else "none"),
    ]
    return [(name, str(words)) for name, words in rows if words]


def number(count: int) -> str:
    """Word a number of parameters: 1.73 M, 197 B."""
    return f"{count / 1e9:.4g} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def size(count: float) -> str:
    """Word a number of bytes: 1.50 GiB, 12.0 MiB."""
    unit, name = next((pair for pair in UNITS if count >= pair[0]), UNITS[-1])
    return f"{count / unit:.3g} {name}"


def _section(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    console.print(table, highlight=False, markup=False)
    console.print()
