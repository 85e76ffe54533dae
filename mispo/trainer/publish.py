"""The policy's weights by name, whatever the ZeRO stage; and their way into the rollout engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn

from mispo.trainer.batch import Layout, ungraded
from mispo.trainer.engine import TrainEngine
from mispo.trainer.history import WeightHistory
from mispo.trainer.scoring import score_policy
from model.lora import MergedWeights
from rollouts.engine import Engine


def full_weights(engine: TrainEngine, module: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The state_dict of a module of this engine; every rank must call it. Under ZeRO-3 gathered one by one, on the CPU.

    keep: whether this rank wants it, or only helps the others; then the tensors have no values.
    """
    if engine.engine.zero_optimization_stage() < 3:
        return {name: tensor.detach() for name, tensor in module.state_dict().items()}
    weights = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        with GatheredParameters([parameter]):
            if keep:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def policy_weights(actor: TrainEngine) -> Mapping[str, Tensor]:
    """The policy's state_dict, adapters merged; every rank must call it."""
    return MergedWeights(actor.module.policy, full_weights(actor, actor.module.policy))


class WeightSync:
    """Brings the policy into the rollout engine and proves that it arrived.

    A sync that silently does nothing is the field's worst bug: after each one the engine's log-probs of a few
    fixed prompts are compared with the trainer's under the same weights.
    staleness: actor updates that the engine is kept behind. tolerance: nats, see rollout.parity_tolerance.
    probe: some token sequences [S], S ≥ 2, the same on all ranks. packed: whether the trainer packs them (`Layout`).
    exact: keep old weights in the trainer's precision, not in that of the rollouts, which may need half of the memory.
    """

    def __init__(
        self,
        actor: TrainEngine,
        engine: Engine,
        history: WeightHistory,
        *,
        probe: Sequence[Tensor],
        packed: bool,
        tolerance: float,
        temperature: float,
        exact: bool = False,
    ) -> None:
        self.actor = actor
        self.engine = engine
        self.history = history
        self.packed = packed
        self.tolerance = tolerance
        self.temperature = temperature
        self.exact = exact
        self._pairs = [(ids[:1], ids[1:]) for ids in probe]
        self._expected: dict[int, list[Tensor]] = {}

    def record(self) -> None:
        """Remember the current weights, if the engine is going to see them later."""
        if self.history.staleness:
            weights = self._weights()
            self.history.push(self.actor.updates, weights if self.exact else self.engine.converted(weights))
            self._expect()

    def publish(self) -> dict[str, float]:
        """Load the weights that are due. RuntimeError if the engine then disagrees with the trainer."""
        if self.history.staleness:
            version, weights = self.history.stale()
        else:
            version, weights = self.actor.updates, self._weights()
            self._expect()
        self.engine.load_weights(weights, version)
        expected = self._expected[version]
        self._expected = {held: kept for held, kept in self._expected.items() if held >= version}
        scores = self.engine.score(self._pairs, self.temperature)
        gaps = torch.cat([(a - b).abs() for a, b in zip(scores, expected, strict=True)])
        gap = gaps.mean().item()
        # The mean: in bf16 a single token whose routing flips may be off by a nat.
        if not gap <= self.tolerance:
            raise RuntimeError(
                f"weight sync: engine and trainer differ by {gap:.3g} nats per token on the same weights (version "
                f"{version}, rollout.parity_tolerance {self.tolerance:g}); the engine did not take the new weights, or "
                "its precision is far off"
            )
        return {"sync/mean_abs": gap, "sync/max_abs": gaps.max().item()}

    def rollout_weights(self) -> tuple[int, Mapping[str, Tensor]]:
        """(version, weights) that the engine holds, as exactly as they are known; every rank must call it."""
        return self.history.stale() if self.history.staleness else (self.actor.updates, self._weights())

    def restore(self, snapshots: dict[int, dict[str, Tensor]], expected: dict[int, list[Tensor]]) -> None:
        """Continue with the snapshots of a checkpoint."""
        for version, weights in snapshots.items():
            self.history.push(version, weights)
        self._expected = expected

    def state(self) -> tuple[dict[int, dict[str, Tensor]], dict[int, list[Tensor]]]:
        """What `restore` takes."""
        return self.history.snapshots, {v: self._expected[v] for v in self.history.versions}

    def _weights(self) -> Mapping[str, Tensor]:
        return policy_weights(self.actor)

    def _expect(self) -> None:
        self._expected[self.actor.updates] = score_texts(self.actor, self._pairs, self.packed, self.temperature)


class NoSync:
    """In place of `WeightSync` where nobody samples: a replay."""

    def record(self) -> None:
        """Nothing to remember."""

    def publish(self) -> dict[str, float]:
        """Nobody to tell."""
        return {}

    def state(self) -> tuple[dict[int, dict[str, Tensor]], dict[int, list[Tensor]]]:
        """Nothing."""
        return {}, {}


def score_texts(
    actor: TrainEngine, pairs: Sequence[tuple[Tensor, Tensor]], packed: bool, temperature: float
) -> list[Tensor]:
    """The trainer's log-probs [T] of each completion [T] after its prompt [P]; the same on all ranks."""
    lengths = [len(completion) for _, completion in pairs]
    batch = ungraded(
        [torch.cat(pair) for pair in pairs],
        [torch.arange(len(prompt) - 1, len(prompt) + len(c) - 1) for prompt, c in pairs],
    )
    layout = Layout(max(len(ids) for ids in batch.ids) * len(pairs), packed)
    scores, _ = score_policy(actor, batch, layout, temperature)
    return list(scores.logprobs_N.split(lengths))
