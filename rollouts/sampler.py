"""From prompts to graded trajectories: build the requests, let the engine sample, decode, grade."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rollouts.engine import Engine, Request, Sample
from rollouts.trajectory import Prompt, Trajectory

if TYPE_CHECKING:
    from rewards.workers import RewardPool


class RolloutWorker:
    """Samples `samples_per_prompt` trajectories for each prompt.

    temperature: > 0 for training, 0 for greedy evaluation. seed: the run's seed; with the prompt's index and
    the sample's number it fixes the request's random numbers, so that a run can be repeated or resumed.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        samples_per_prompt: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        if samples_per_prompt < 1:
            raise ValueError(f"rollout.samples_per_prompt: {samples_per_prompt} is less than 1")
        self.engine = engine
        self.tokenizer = tokenizer
        self.samples_per_prompt = samples_per_prompt
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed

    def sample(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        """All samples of the first prompt, then of the second, …; rewards not set."""
        jobs = [(prompt, sample) for prompt in prompts for sample in range(self.samples_per_prompt)]
        requests = [
            Request(
                prompt_ids=prompt.ids,
                seed=request_seed(self.seed, prompt.index, sample),
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
            )
            for prompt, sample in jobs
        ]
        samples = self.engine.generate(requests)
        return [
            self._trajectory(prompt, number, request, sample)
            for (prompt, number), request, sample in zip(jobs, requests, samples, strict=True)
        ]

    def _trajectory(self, prompt: Prompt, number: int, request: Request, sample: Sample) -> Trajectory:
        ids = sample.completion_ids
        text_ids = ids[:-1] if sample.finish_reason == "stop" else ids
        return Trajectory(
            prompt=prompt,
            sample=number,
            seed=request.seed,
            completion_ids=ids,
            action_mask=torch.ones(len(ids), dtype=torch.bool),
            rollout_logprobs=sample.logprobs,
            finish_reason=sample.finish_reason,
            weight_version=sample.weight_version,
            routing_confidence=sample.routing_confidence,
            routed_experts=sample.routed_experts,
            completion=self.tokenizer.decode(
                text_ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
            ),
        )


def request_seed(run_seed: int, prompt_index: int, sample: int) -> int:
    """63-bit hash, the same on every machine and in every process."""
    digest = hashlib.blake2b(f"{run_seed}:{prompt_index}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def grade(trajectories: Sequence[Trajectory], pool: RewardPool) -> list[Trajectory]:
    """The same trajectories with reward and reward_info set, in order; truncated ones are graded too."""
    scores = pool.score(
        [
            {
                "prompt": trajectory.prompt.text,
                "completion": trajectory.completion,
                "answer": trajectory.prompt.answer,
                "row": trajectory.prompt.row,
            }
            for trajectory in trajectories
        ]
    )
    return [
        replace(trajectory, reward=score.value, reward_info=score.info)
        for trajectory, score in zip(trajectories, scores, strict=True)
    ]


@dataclass(frozen=True)
class Taken:
    """This rank's graded trajectories of a step, whole prompts in order; and metrics."""

    trajectories: list[Trajectory]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Weights:
    """Weights for the engine, and log-probs `expected` [T] of the completions of `probe` under them."""

    version: int
    tensors: Mapping[str, Tensor]
    probe: list[tuple[Tensor, Tensor]]
    expected: list[Tensor]


class Sampler(Protocol):
    def take(self, step: int) -> Taken: ...

    def publish(self, weights: Weights | None) -> dict[str, float]: ...

    def close(self) -> None: ...


def publish(engine: Engine, weights: Weights, tolerance: float, temperature: float) -> dict[str, float]:
    """Load weights into the engine and prove that it took them. RuntimeError if it did not."""
    engine.load_weights(weights.tensors, weights.version)
    scores = engine.score(weights.probe, temperature)
    gaps = torch.cat([(a - b).abs() for a, b in zip(scores, weights.expected, strict=True)])
    gap = gaps.mean().item()
    # The mean: in bf16 a single token whose routing flips may be off by a nat.
    if not gap <= tolerance:
        raise RuntimeError(
            f"weight sync: engine and trainer differ by {gap:.3g} nats per token on the same weights (version "
            f"{weights.version}, rollout.parity_tolerance {tolerance:g}); the engine did not take the new weights, or "
            "its precision is far off"
        )
    return {"sync/mean_abs": gap, "sync/max_abs": gaps.max().item()}
