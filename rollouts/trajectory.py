"""The two records that travel through the whole system: `Prompt` goes in, `Trajectory` comes out.

Token in, token out: text is kept for people and graders and is never encoded again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length", "loop", "abort"]
"""Why generation ended, as the engine says it: end token, token limit, loop detector, wall clock or fault."""

FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "loop", "abort")


@dataclass(frozen=True)
class Prompt:
    """One problem to solve.

    ids: token ids [P], int64, with the chat template applied.
    text: the question as a person reads it.
    answer: the reference answer for the verifier.
    row: the full data row (JSON-like); passed to the reward function as keyword arguments.
    index: position in the prompt stream, unique within a run; seeds derive from it.
    """

    ids: Tensor
    text: str
    answer: str
    row: dict[str, Any]
    index: int


@dataclass(frozen=True)
class Turn:
    """Generated tokens that one request has given.

    span: (start, stop) among the completion's tokens. weight_version: of the weights that sampled them.
    finish_reason: why the engine stopped there.
    """

    span: tuple[int, int]
    weight_version: int
    finish_reason: FinishReason


@dataclass(frozen=True)
class Trajectory:
    """One sampled completion with everything the trainer needs to know about how it came about.

    prompt: the problem it answers; `prompt_ids` [P] int64 comes from it.
    sample: which of the samples_per_prompt attempts this is.
    seed: seed of the request.
    completion_ids: [T] int64, the generated tokens, the end token included where it was sampled, and between them what
        the environment replied; T ≥ 1.
    action_mask: [T] bool, false on tokens that no engine wrote: those are never scored.
    rollout_logprobs: [T] float32, log softmax(logits / temperature) at the sampled token (the proposal); 0 on tokens
        that no engine wrote.
    turns: the generated parts, in order; a single one where the environment does not reply.
    finish_reason: the last turn's, from the engine, never inferred from lengths; "length" also where the environment's
        reply would have left no token to generate.
    weight_version: actor optimizer updates contained in the weights that sampled it, those of its oldest turn.
    routing_confidence: [MoE layers] float32, mean over the generated tokens of the probability mass of the
        activated experts, as seen by the rollout engine; None for a dense model.
    routed_experts: [P+T−1, MoE layers, k], smallest integer type: the experts that the rollout activated at each
        position but the last, which no forward has seen; None for a dense model, or if they were not recorded.
    completion: the decoded text, special tokens included, for people and graders.
    reward, reward_info, reward_parts: set by grading; reward is NaN before. reward_parts: the value of each named part
        of the reward, before its weight.
    """

    prompt: Prompt
    sample: int
    seed: int
    completion_ids: Tensor
    action_mask: Tensor
    rollout_logprobs: Tensor
    turns: tuple[Turn, ...]
    finish_reason: FinishReason
    weight_version: int
    routing_confidence: Tensor | None
    routed_experts: Tensor | None
    completion: str
    reward: float = float("nan")
    reward_info: dict[str, Any] = field(default_factory=dict)
    reward_parts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        length = self.completion_ids.shape[0]
        assert length >= 1, "a trajectory has at least one generated token"
        assert self.action_mask.shape == (length,), "action_mask must be [T]"
        assert self.action_mask.dtype == torch.bool, "action_mask must be bool"
        assert self.rollout_logprobs.shape == (length,), "rollout_logprobs must be [T]"
        positions = len(self.prompt.ids) + length - 1
        assert self.routed_experts is None or len(self.routed_experts) == positions, "routed_experts must be [P+T−1, …]"
        assert self.finish_reason in FINISH_REASONS, self.finish_reason
        edges = [edge for turn in self.turns for edge in turn.span]
        assert edges, "a trajectory has at least one turn"
        assert edges == sorted(edges), "turns must be in order"
        assert edges[-1] <= length, "turns must lie in the completion"

    @property
    def prompt_ids(self) -> Tensor:
        """[P] int64."""
        return self.prompt.ids

    @property
    def truncated(self) -> bool:
        """Whether the token limit has cut it: its return is bootstrapped with V(s_T) (report §5.2.2)."""
        return self.finish_reason == "length"

    def __len__(self) -> int:
        return int(self.completion_ids.shape[0])
