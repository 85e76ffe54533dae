"""Checkpoints: the actor is a plain Hugging Face directory, everything else lies beside it.

checkpoints/step_N/
    actor/                        config, weights (fp32), modeling code, tokenizer
    adapters.safetensors          with LoRA: the policy's adapters, which are merged into actor/
    critic.safetensors            the critic's weights (with LoRA: adapters and head), or a shared one's head
    {actor,critic}_optimizer.safetensors   NAME.exp_avg, NAME.exp_avg_sq (AdamW), NAME.momentum_buffer (Muon)
    history.safetensors           old weights, under rollout.lag
    rng.pt                        random states of the first rank
    state.json                    step, the states of everything that is registered, the other files' sizes
All states are full tensors by parameter name, so another number of ranks or ZeRO stage can read them.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mispo.system.files import writing
from mispo.system.rundir import RunDir
from mispo.trainer.batch import ModelInput
from mispo.trainer.checkpoint.files import finish_checkpoint, list_checkpoints, read_state, superfluous
from mispo.trainer.engine import TrainEngine
from mispo.trainer.learner import Learner
from mispo.trainer.policy import ActorModule, CriticModule
from mispo.trainer.publish import full_weights
from model.lora import MergedWeights, has_lora, trained

State = Mapping[str, Any]
"""Values that JSON can hold."""


class Stateful(Protocol):
    """A part of a run whose state a checkpoint holds, beside weights and optimizers."""

    def state(self) -> State:
        """Return what `restore` takes."""
        ...

    def restore(self, state: State) -> None:
        """Continue where a checkpoint was."""
        ...


class Checkpoints:
    """Writes checkpoints of a run and continues from one.

    directory: of the run. registered: the parts that have a state, by their name in state.json. last: the newest
    checkpoint, None before the first.
    """

    def __init__(
        self,
        directory: RunDir,
        learner: Learner,
        tokenizer: PreTrainedTokenizerBase,
        registered: Mapping[str, Stateful],
        *,
        keep_last: int,
        keep_best: int,
        last: Path | None,
    ) -> None:
        self.directory = directory
        self.learner = learner
        self.tokenizer = tokenizer
        self.registered = registered
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.last = last

    def states(self) -> dict[str, State]:
        """Return the states of everything that is registered, as they are now."""
        return {name: part.state() for name, part in self.registered.items()}

    def save(self, step: int, states: Mapping[str, State] | None = None) -> Path:
        """Write checkpoints/step_N and return its path; every rank calls, the first one writes.

        states: those at the end of that step, if the next one has begun since. OSError if it cannot be written; earlier
        checkpoints then remain.
        """
        final = self.directory.checkpoint(step)
        with writing(final):
            self._write(step, final, self.states() if states is None else states)
        self.last = final
        return final

    def _write(self, step: int, final: Path, states: Mapping[str, State]) -> None:
        temporary = final.with_name(final.name + ".tmp")
        actor, critic = self.learner.actor, self.learner.critic
        first = self.learner.ranks.first
        raw = full_weights(actor, actor.module.policy, keep=first)
        tensors = self._tensors(actor, critic, raw)
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                policy = dict(MergedWeights(actor.module.policy, raw))
                actor.module.policy.save_pretrained(temporary / "actor", state_dict=policy)
                self.tokenizer.save_pretrained(temporary / "actor")
                for name, held in tensors.items():
                    _save(held, temporary / f"{name}.safetensors")
                torch.save(_random_states(), temporary / "rng.pt")
            except (SafetensorError, RuntimeError) as error:  # raised by safetensors and torch on a full disk
                raise OSError(f"the checkpoint {final} could not be written: {error}") from error
            finish_checkpoint(temporary, final, {"step": step, "states": states})
            for old in superfluous(list_checkpoints(self.directory.checkpoints), self.keep_last, self.keep_best):
                shutil.rmtree(old)
        self.learner.ranks.barrier()

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint; the weights themselves were read when the models were built.

        ValueError, before anything is restored, if the checkpoint's states are not those of this run's parts.
        """
        states = read_state(checkpoint)["states"]
        for name in sorted(self.registered.keys() ^ states.keys()):
            held = "has no state of" if name in self.registered else "has an unknown state,"
            raise ValueError(f"--resume: {checkpoint} {held} {name}; it was written by another version of mispo")
        for name, part in self.registered.items():
            part.restore(states[name])
        for engine in (self.learner.actor, self.learner.critic):
            if engine is not None and engine.updates:
                path = checkpoint / f"{engine.name}_optimizer.safetensors"
                _load_optimizer(engine, load_file(path), path)
        if self.learner.publisher:
            self.learner.publisher.restore(load_file(checkpoint / "history.safetensors"))
        _restore_random_states(checkpoint / "rng.pt")

    def _tensors(
        self, actor: TrainEngine[ActorModule], critic: TrainEngine[CriticModule] | None, policy: Mapping[str, Tensor]
    ) -> dict[str, Mapping[str, Tensor]]:
        """Return tensors by file; collective, and whole on the first rank only."""
        first, publisher = self.learner.ranks.first, self.learner.publisher
        files: dict[str, Mapping[str, Tensor]] = {}
        if has_lora(actor.module) and first:
            files["adapters"] = trained(actor.module.policy, policy)
        values = value_weights(actor, critic)
        if values:
            files["critic"] = values
        for engine in (actor, critic):
            if engine is not None:
                files[f"{engine.name}_optimizer"] = engine.states.read(keep=first) if engine.updates else {}
        return files | {"history": publisher.tensors() if publisher else {}}


def value_weights(actor: TrainEngine[ActorModule], critic: TrainEngine[CriticModule] | None) -> dict[str, Tensor]:
    """Return the weights of the critic, or of the value head on the policy's trunk; {} without either."""
    if critic:
        weights = full_weights(critic, critic.module.critic, keep=critic.ranks.first)
        return trained(critic.module.critic, weights) if has_lora(critic.module) else weights
    head = actor.module.value_head
    return full_weights(actor, head, keep=actor.ranks.first) if head else {}


def _load_optimizer(engine: TrainEngine[Any], states: dict[str, Tensor], path: Path) -> None:
    odd = sorted(engine.states.names() ^ states.keys())
    if odd:
        raise ValueError(f"--resume: {path} belongs to another model or optimizer: {odd[0]} is in only one of them")
    engine.create_states(_zero_loss(engine))
    engine.states.write(states, engine.updates)


def _zero_loss(engine: TrainEngine[Any]) -> Tensor:
    """Return 0, with a gradient of 0 for every parameter."""
    ids = torch.zeros((1, 1), dtype=torch.int64, device=engine.ranks.device)
    none = torch.empty(0, dtype=torch.int64, device=engine.ranks.device)
    x = ModelInput(ids, none, none, none, positions=None, lengths=(1,))
    outputs = engine.forward(x, 1.0) if engine.name == "actor" else (engine.forward(x),)
    return sum(output.sum() for output in outputs if output is not None) * 0


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _random_states() -> dict[str, Any]:
    numpy: Any = np.random.get_state()
    kind, keys, *rest = numpy
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.copy()), *rest),
    }


def _restore_random_states(path: Path) -> None:
    states = torch.load(path, weights_only=True)
    torch.set_rng_state(states["torch"])
    random.setstate(_tuple(states["python"]))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, list | tuple) else value
