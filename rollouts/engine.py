"""What every rollout engine takes and gives: a `Request` goes in, a `Sample` comes out, weights go by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rollouts.trajectory import FinishReason


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do.

    experts: records which experts were activated. replay: scores with given experts. loops: has a loop detector.
    stop_strings: ends a completion at a text.
    """

    experts: bool
    replay: bool
    loops: bool
    stop_strings: bool


@dataclass(frozen=True)
class Request:
    """One completion to generate.

    prompt_ids: [P] int64, P ≥ 1, with the chat template applied.
    seed: seeds this request's random numbers, in [0, 2⁶³).
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
    """Samples with a separate copy of the policy's weights; requests come and go while others run.

    The tokens of a request depend on its prompt, seed, limit, temperature and the weights, never on other requests.
    """

    @property
    def can(self) -> Capabilities:
        """What this engine can do with this model."""
        ...

    @property
    def weight_version(self) -> int:
        """Actor optimizer updates contained in the current weights."""
        ...

    def submit(self, request: Request) -> int:
        """Take a request and return its ticket, unique in the engine's life; others may be running.

        ValueError for a request that cannot be served. RuntimeError while the engine is asleep.
        """
        ...

    def finished(self) -> list[tuple[int, Sample]]:
        """Advance sampling and return (ticket, sample) of the requests that have ended since the last call.

        May return none while requests are running, so that the caller can look up; none forever when there is
        nothing to do. If it raises, all requests are dropped, and the engine can be used again.
        """
        ...

    def cancel(self, tickets: Collection[int]) -> None:
        """Drop running and waiting requests; unknown tickets are ignored."""
        ...

    def converted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights in the engine's precision: `load` makes the same of both."""
        ...

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy weights in (names as in the model's state_dict).

        ValueError names every missing, unknown or misshapen tensor, and then nothing has been changed.
        """
        ...

    def score(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        temperature: float,
        experts: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Return the log-probs [T] float32 (CPU) of each completion [T] after its prompt [P].

        Under the current weights, by a full forward without a cache (temperature 0 counts as 1, as in
        `Sample.logprobs`). experts: for each pair the experts [P+T−1, MoE layers, k] to activate; None = the model's
        own choice.
        """
        ...

    def sleep(self) -> None:
        """Free what only sampling needs, until `wake`. RuntimeError while there are requests."""
        ...

    def wake(self) -> None:
        """Take requests again."""
        ...


def run_all(engine: Engine, requests: Sequence[Request]) -> list[Sample]:
    """Sample all requests on an engine that has nothing else to do; one sample per request, in their order.

    ValueError names a request that cannot be served; the others are dropped.
    """
    places: dict[int, int] = {}
    samples: dict[int, Sample] = {}
    try:
        for place, request in enumerate(requests):
            try:
                places[engine.submit(request)] = place
            except ValueError as error:
                raise ValueError(f"request {place}: {error}") from error
        while len(samples) < len(requests):
            samples |= {places[ticket]: sample for ticket, sample in engine.finished()}
    finally:
        engine.cancel(places)
    return [samples[place] for place in range(len(requests))]
