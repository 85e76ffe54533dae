"""The policy's weights by name, on any ZeRO stage, and the log-probs that prove their arrival in the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn

from mispo.trainer.batch import Layout, sequences
from mispo.trainer.engine import TrainEngine
from mispo.trainer.history import WeightHistory
from mispo.trainer.policy import ActorModule
from mispo.trainer.scoring import score_policy
from model.lora import MergedWeights
from rollouts.sampler import Weights

Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def full_weights(engine: TrainEngine[Any], module: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Return the state_dict of a module of this engine; collective. Under ZeRO-3 gathered one by one, on the CPU.

    keep: whether this rank keeps the values, or only helps the others to gather them.
    """
    weights = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    if engine.engine.zero_optimization_stage() < 3:
        return weights
    for name, parameter in module.named_parameters():
        with GatheredParameters([parameter]):
            if keep:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def policy_weights(actor: TrainEngine[ActorModule]) -> Mapping[str, Tensor]:
    """Return the policy's state_dict, adapters merged; collective."""
    return MergedWeights(actor.module.policy, full_weights(actor, actor.module.policy))


class Publisher:
    """Decides which weights the rollout engine gets, and which log-probs it must compute with them.

    An engine can silently keep its old weights. So the trainer's log-probs of a few fixed texts go with the weights,
    and the sampler compares them with the engine's. history: old weights, where rollouts lag (rollout.lag). probe: some
    token sequences [S], S ≥ 2, the same on all ranks. packed: whether the trainer packs them (`Layout`). convert: into
    the precision in which old weights are kept.
    """

    def __init__(
        self,
        actor: TrainEngine[ActorModule],
        history: WeightHistory,
        *,
        probe: Sequence[Tensor],
        packed: bool,
        temperature: float,
        convert: Convert,
    ) -> None:
        self.actor = actor
        self.history = history
        self.packed = packed
        self.temperature = temperature
        self.convert = convert
        self._pairs = [(ids[:1], ids[1:]) for ids in probe]
        self._expected: dict[int, list[Tensor]] = {}

    def record(self) -> None:
        """Keep the current weights, if the engine will sample from them later; collective."""
        if self.history.lag:
            self.history.push(self.actor.updates, self.convert(policy_weights(self.actor)))
            self._expect()

    def due(self) -> Weights:
        """Return the weights that the engine has to sample from now on; collective."""
        if not self.history.lag:
            self._expect()
        version, weights = self.sampled()
        self._expected = {held: kept for held, kept in self._expected.items() if held >= version}
        return Weights(version, weights, self._pairs, self._expected[version])

    def sampled(self) -> tuple[int, Mapping[str, Tensor]]:
        """Return (version, weights) that are due, old ones in the precision in which they are kept; collective."""
        return self.history.stale() if self.history.lag else (self.actor.updates, policy_weights(self.actor))

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that `restore` takes, by name: VERSION/parameter and VERSION/probe/number."""
        saved = {f"{version}/{name}": t for version, held in self.history.snapshots.items() for name, t in held.items()}
        for version in self.history.versions:
            saved |= {f"{version}/probe/{i}": t for i, t in enumerate(self._expected[version])}
        return saved

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue with the old weights of a checkpoint; without lag there is no use for them."""
        if not self.history.lag:
            return
        snapshots: dict[int, dict[str, Tensor]] = {}
        expected: dict[int, dict[int, Tensor]] = {}
        for key, tensor in tensors.items():
            version, _, name = key.partition("/")
            if name.startswith("probe/"):
                expected.setdefault(int(version), {})[int(name.removeprefix("probe/"))] = tensor
            else:
                snapshots.setdefault(int(version), {})[name] = tensor
        for held in sorted(snapshots):
            self.history.push(held, snapshots[held])
        self._expected = {version: [kept[i] for i in sorted(kept)] for version, kept in expected.items()}
        if not snapshots:
            self.record()  # rollouts that were current until now begin to lag

    def _expect(self) -> None:
        self._expected[self.actor.updates] = score_texts(self.actor, self._pairs, self.packed, self.temperature)


def score_texts(
    actor: TrainEngine[ActorModule], pairs: Sequence[tuple[Tensor, Tensor]], packed: bool, temperature: float
) -> list[Tensor]:
    """Compute the trainer's log-probs [T] of each completion [T] after its prompt [P]; the same on all ranks."""
    lengths = [len(completion) for _, completion in pairs]
    batch = sequences(
        [torch.cat(pair) for pair in pairs],
        [torch.arange(len(prompt) - 1, len(prompt) + len(c) - 1) for prompt, c in pairs],
    )
    layout = Layout(max(len(ids) for ids in batch.ids) * len(pairs), packed)
    scores, _ = score_policy(actor, batch, layout, temperature)
    return list(scores.logprobs_N.split(lengths))
