"""Checkpoints: the actor is a plain Hugging Face directory, everything else lies beside it.

checkpoints/step_N/
    actor/                        config, weights (fp32), modeling code, tokenizer
    adapters.safetensors          with LoRA: the policy's adapters, which are merged into actor/
    critic.safetensors            the critic's weights (with LoRA: adapters and head), or a shared one's head
    {actor,critic}_optimizer.safetensors   NAME.exp_avg, NAME.exp_avg_sq (AdamW), NAME.momentum_buffer (Muon)
    history.safetensors           old weights, under rollout.staleness
    rng.pt                        random states of the first rank
    state.json                    counters, data cursor, states of filter and alarms, W&B id; the other files' sizes
All states are full tensors by parameter name, so another number of ranks or ZeRO stage can read them.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mispo.trainer.batch import ModelInput
from mispo.trainer.checkpoint.files import finish_checkpoint, list_checkpoints, read_state, superfluous
from mispo.trainer.engine import TrainEngine
from mispo.trainer.publish import NoSync, WeightSync, full_weights
from model.lora import MergedWeights, has_lora, trained


@dataclass(frozen=True)
class Progress:
    """How far a run is; saved in state.json.

    score: greedy held-out accuracy, if it was measured at this step. low_confidence: what counts as it, per MoE layer.
    """

    step: int
    cursor: int
    actor_updates: int
    critic_updates: int
    wandb_id: str | None
    filter_state: dict[str, float]
    alarms_seen: dict[str, int]
    score: float | None
    low_confidence: list[float] | None


def save_checkpoint(
    directory: Path,
    *,
    progress: Progress,
    actor: TrainEngine,
    critic: TrainEngine | None,
    tokenizer: PreTrainedTokenizerBase,
    sync: WeightSync | NoSync,
    keep_last: int,
    keep_best: int,
) -> Path:
    """Write checkpoints/step_N under `directory`; every rank calls, the first one writes. Returns its path.

    OSError if it cannot be written; the checkpoints before are then still there.
    """
    final = directory / f"step_{progress.step}"
    temporary = final.with_name(final.name + ".tmp")
    first, adapters = actor.ranks.first, has_lora(actor.module)
    raw = full_weights(actor, actor.module.policy, keep=first)
    values = value_weights(actor, critic)
    moments = {e.name: e.states.read(keep=first) if e.updates else {} for e in (actor, critic) if e}
    if first:
        policy = dict(MergedWeights(actor.module.policy, raw))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            actor.module.policy.save_pretrained(temporary / "actor", state_dict=policy)
            tokenizer.save_pretrained(temporary / "actor")
            if adapters:
                _save(trained(actor.module.policy, raw), temporary / "adapters.safetensors")
            if values:
                _save(values, temporary / "critic.safetensors")
            for name, states in moments.items():
                _save(states, temporary / f"{name}_optimizer.safetensors")
            _save(_history(sync), temporary / "history.safetensors")
            torch.save(_random_states(), temporary / "rng.pt")
        except (SafetensorError, RuntimeError) as error:  # what safetensors and torch make of a full disk
            raise OSError(f"the checkpoint {final} could not be written: {error}") from error
        finish_checkpoint(temporary, final, vars(progress))
        for old in superfluous(list_checkpoints(directory), keep_last, keep_best):
            shutil.rmtree(old)
    actor.ranks.barrier()
    return final


def value_weights(actor: TrainEngine, critic: TrainEngine | None) -> dict[str, Tensor]:
    """The critic's weights: of its own model, or of the value head on the policy's trunk; {} without a critic."""
    if critic:
        weights = full_weights(critic, critic.module.critic, keep=critic.ranks.first)
        return trained(critic.module.critic, weights) if has_lora(critic.module) else weights
    head = actor.module.value_head
    return full_weights(actor, head, keep=actor.ranks.first) if head else {}


def load_progress(checkpoint: Path) -> Progress:
    """The counters of a checkpoint."""
    return Progress(**read_state(checkpoint)["progress"])


def load_states(
    checkpoint: Path, progress: Progress, *, actor: TrainEngine, critic: TrainEngine | None, sync: WeightSync
) -> None:
    """Optimizers, counters, old weights and random states; the weights themselves were read when the models
    were built."""
    for engine, updates in ((actor, progress.actor_updates), (critic, progress.critic_updates)):
        if engine is None:
            continue
        path = checkpoint / f"{engine.name}_optimizer.safetensors"
        engine.updates = updates
        if updates:
            _load_optimizer(engine, load_file(path), path)
    snapshots: dict[int, dict[str, Tensor]] = {}
    expected: dict[int, list[tuple[int, Tensor]]] = {}
    for key, tensor in load_file(checkpoint / "history.safetensors").items():
        version, _, name = key.partition("/")
        if name.startswith("probe/"):
            expected.setdefault(int(version), []).append((int(name.removeprefix("probe/")), tensor))
        else:
            snapshots.setdefault(int(version), {})[name] = tensor
    sync.restore(
        {version: snapshots[version] for version in sorted(snapshots)},
        {version: [t for _, t in sorted(pairs, key=lambda p: p[0])] for version, pairs in expected.items()},
    )
    states = torch.load(checkpoint / "rng.pt", weights_only=True)
    torch.set_rng_state(states["torch"])
    random.setstate(_tuple(states["python"]))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _history(sync: WeightSync | NoSync) -> dict[str, Tensor]:
    snapshots, expected = sync.state()
    tensors = {f"{version}/{name}": t for version, weights in snapshots.items() for name, t in weights.items()}
    return tensors | {f"{version}/probe/{i}": t for version, probes in expected.items() for i, t in enumerate(probes)}


def _load_optimizer(engine: TrainEngine, states: dict[str, Tensor], path: Path) -> None:
    odd = sorted(engine.states.names() ^ states.keys())
    if odd:
        raise ValueError(f"--resume: {path} belongs to another model or optimizer: {odd[0]} is in only one of them")
    engine.create_states(_zero_loss(engine))
    engine.states.write(states, engine.updates)


def _zero_loss(engine: TrainEngine) -> Tensor:
    """0, with a gradient of 0 for every parameter."""
    ids = torch.zeros((1, 1), dtype=torch.int64, device=engine.ranks.device)
    none = torch.empty(0, dtype=torch.int64, device=engine.ranks.device)
    x = ModelInput(ids, none, none, none, positions=None, lengths=(1,))
    outputs = engine.forward(x, 1.0) if engine.name == "actor" else (engine.forward(x),)
    return sum(output.sum() for output in outputs if output is not None) * 0


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.copy()), *rest),
    }


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, list | tuple) else value
