"""What every rollout engine takes and gives: `Request` in, `Sample` out, weights by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rollouts.trajectory import FinishReason


@dataclass(frozen=True)
class Request:
    """One completion to generate.

    prompt_ids: [P] int64, P ≥ 1, with the chat template applied.
    seed: seeds this request's own random numbers, in [0, 2⁶³).
    max_new_tokens: limit on generated tokens, ≥ 1; reaching it is finish_reason "length".
    temperature: ≥ 0; 0 takes the most likely token.
    """

    prompt_ids: Tensor
    seed: int
    max_new_tokens: int
    temperature: float


@dataclass(frozen=True)
class Sample:
    """One generated completion, on the CPU.

    completion_ids: [T] int64, 1 ≤ T ≤ max_new_tokens, the end token included where it was sampled.
    logprobs: [T] float32, log softmax(logits / temperature) at the sampled token (temperature 1 if greedy).
    finish_reason: "stop" after an end token, else "length"; other engines may add "loop" and "abort".
    weight_version: version of the weights that sampled it.
    routing_confidence: [MoE layers] float32, mean over the forwards whose logits gave the T tokens (positions
        P−1 … P+T−2) of the activated experts' probability mass; None for a dense model.
    routed_experts: [P+T−1, MoE layers, k], see `Trajectory.routed_experts`.
    """

    completion_ids: Tensor
    logprobs: Tensor
    finish_reason: FinishReason
    weight_version: int
    routing_confidence: Tensor | None
    routed_experts: Tensor | None


class Engine(Protocol):
    """A rollout engine holds its own copy of the policy's weights."""

    weight_version: int
    """Actor optimizer updates contained in the current weights."""

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """One sample per request, in request order. ValueError names a request that cannot be served."""
        ...

    def converted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights in the engine's own precision: `load_weights` makes the same of both."""
        ...

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy `weights` (names as in the model's state_dict) in. ValueError names every missing, unknown or
        misshapen tensor, and then nothing has been changed."""
        ...

    def score(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        temperature: float,
        experts: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Log-probs [T] float32 (CPU) of each completion [T] after its prompt [P], under the current weights,
        by a full forward without a cache (temperature 0 counts as 1, as in `Sample.logprobs`).

        experts: for each pair the experts [P+T−1, MoE layers, k] to activate; None = the model's own choice."""
        ...
