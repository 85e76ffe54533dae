"""The table of running sequences: the request in each slot, and what it has generated so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rollouts.engine import Request, Sample
from rollouts.trajectory import FinishReason


def request_uniforms(seed: int, count: int) -> Tensor:
    """Draw [count] float64 in [0, 1): the random numbers of one request, the same in every slot and batch."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pick_tokens(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one token per row by inverse CDF, and return tokens and log-probs.

    logits: [n, V]; temperature: [n] float32, 0 = most likely token; uniform: [n] float64.
    Token ids are [n] int64, log-probs [n] float32 under softmax(logits / temperature) (temperature 1 where it is 0).
    The CDF is summed in float64: in float32 rare tokens of a large vocabulary would be lost to rounding, and the
    recorded log-prob would not be that of the sampler.
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    logprobs = torch.log_softmax(scaled, dim=-1)
    cdf = logprobs.double().exp().cumsum(-1)
    sampled = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
    sampled = sampled.clamp_max(logits.shape[-1] - 1)
    tokens = torch.where(greedy, logits.argmax(-1), sampled)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


@dataclass(frozen=True)
class Rows:
    """What a decode step needs on the device, one row per slot. W: generated tokens that fit, R: MoE layers."""

    prompt: Tensor
    """[slots] int64, prompt tokens."""
    generated: Tensor
    """[slots] int64, tokens generated so far."""
    limit: Tensor
    """[slots] int64, max_new_tokens."""
    temperature: Tensor
    """[slots] float32."""
    uniforms: Tensor
    """[slots, W] float64, the request's random numbers."""
    tokens: Tensor
    """[slots, W] int64."""
    logprobs: Tensor
    """[slots, W] float32."""
    confidence: Tensor
    """[slots, R] float64, sum over the generated tokens."""

    @staticmethod
    def empty(slots: int, width: int, routers: int, device: torch.device) -> Rows:
        """Make rows of zeros."""

        def rows(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        return Rows(
            prompt=rows(torch.int64),
            generated=rows(torch.int64),
            limit=rows(torch.int64),
            temperature=rows(torch.float32),
            uniforms=rows(torch.float64, width),
            tokens=rows(torch.int64, width),
            logprobs=rows(torch.float32, width),
            confidence=rows(torch.float64, routers),
        )

    def grown(self, slots: int, width: int) -> Rows:
        """Copy into larger rows."""
        larger = Rows.empty(slots, width, self.confidence.shape[1], self.prompt.device)
        for name, old in vars(self).items():
            copy_into(getattr(larger, name), old)
        return larger


def copy_into(larger: Tensor, old: Tensor) -> None:
    """Fill the first cells of a tensor, along every dimension, with those of a smaller one."""
    larger[tuple(slice(size) for size in old.shape)] = old


class SlotTable:
    """State of the slots, one row each; the first `count` rows are running.

    The host counts the lengths itself, so that a step costs one synchronisation: the list of finished slots.
    slots: rows. max_new_tokens: the largest limit of any request. longest: the most positions that one can take.
    routers: MoE layers, 0 for a dense model.
    """

    def __init__(
        self,
        slots: int,
        max_new_tokens: int,
        longest: int,
        routers: int,
        eos_token_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        self.slots = slots
        self.positions = longest
        self.eos = torch.tensor(list(eos_token_ids), device=device)
        self.count = 0
        self.tickets: list[int] = []
        # Prompt and generated tokens, on the host.
        self.length = torch.zeros(slots, dtype=torch.int64)
        self.rows = Rows.empty(slots, max_new_tokens, routers, device)
        # On the host, allocated when it is first written: [slots, positions, routers, k].
        self.experts: Tensor | None = None

    @property
    def free(self) -> int:
        """Number of empty slots."""
        return self.slots - self.count

    @property
    def longest(self) -> int:
        """Tokens of the longest running sequence, prompt and generated; the last one is not cached yet."""
        return int(self.length[: self.count].max())

    def grow(self, slots: int, max_new_tokens: int, longest: int) -> None:
        """Make room for more slots or longer requests; what is running stays."""
        width = self.rows.tokens.shape[1]
        if slots > self.slots or max_new_tokens > width:
            self.rows = self.rows.grown(max(slots, self.slots), max(max_new_tokens, width))
        if slots > self.slots:
            length, self.length = self.length, torch.zeros(slots, dtype=torch.int64)
            copy_into(self.length, length)
        if self.experts is not None and (slots > self.slots or longest > self.positions):
            held = self.experts
            self.experts = held.new_empty(max(slots, self.slots), max(longest, self.positions), *held.shape[2:])
            copy_into(self.experts, held)
        self.slots, self.positions = max(slots, self.slots), max(longest, self.positions)

    def admit(self, tickets: Sequence[int], requests: Sequence[Request]) -> None:
        """Append requests; `record` their first token next."""
        start, stop = self.count, self.count + len(requests)
        rows = self.rows
        self.count = stop
        self.tickets += tickets
        self.length[start:stop] = torch.tensor([len(request.prompt_ids) for request in requests])
        rows.prompt[start:stop] = self.length[start:stop]
        rows.generated[start:stop] = 0
        rows.limit[start:stop] = torch.tensor([request.max_new_tokens for request in requests])
        rows.temperature[start:stop] = torch.tensor([request.temperature for request in requests])
        for row, request in enumerate(requests, start):
            uniforms = request_uniforms(request.seed, request.max_new_tokens)
            rows.uniforms[row, : len(uniforms)] = uniforms

    def current(self) -> tuple[Tensor, Tensor]:
        """Return the newest token of each running sequence and its position, both [n, 1]; neither is cached yet."""
        last = self.rows.generated[: self.count, None] - 1
        return self.rows.tokens[: self.count].gather(1, last), self.rows.prompt[: self.count, None] + last

    def record(self, start: int, logits: Tensor) -> list[int]:
        """Sample the next token of the slots start … count−1 from logits [count − start, V].

        Returns the slots that have finished, ascending.
        """
        new, rows = slice(start, self.count), self.rows
        at = rows.generated[new, None]
        uniform = rows.uniforms[new].gather(1, at)[:, 0]
        tokens, logprobs = pick_tokens(logits, rows.temperature[new], uniform)
        rows.tokens[new].scatter_(1, at, tokens[:, None])
        rows.logprobs[new].scatter_(1, at, logprobs[:, None])
        rows.generated[new] += 1
        self.length[new] += 1
        ended = torch.isin(tokens, self.eos) | (rows.generated[new] >= rows.limit[new])
        return [start + row for row in ended.nonzero()[:, 0].tolist()]

    def route(self, slots: slice, first: Tensor, experts_LsSk: Tensor) -> None:
        """Keep the activated experts of these slots, at S positions of each from `first` [slots] on.

        Positions after a sequence's end are overwritten later, or never read.
        """
        layers, _, width, k = experts_LsSk.shape
        if self.experts is None:
            self.experts = torch.empty(self.slots, self.positions, layers, k, dtype=experts_LsSk.dtype)
        at = first.cpu()[:, None] + torch.arange(width)
        rows = torch.arange(slots.start, slots.stop)[:, None].expand_as(at)
        inside = at < self.positions
        self.experts[rows[inside], at[inside]] = experts_LsSk.cpu().permute(1, 2, 0, 3)[inside]

    def samples(self, slots: list[int], weight_version: int) -> list[Sample]:
        """Return the samples of these slots.

        RuntimeError if a log-prob is not finite, since the samples are then worthless.
        """
        rows = self.rows
        counts = rows.generated[slots].tolist()
        tokens, logprobs, confidence = (x[slots].cpu() for x in (rows.tokens, rows.logprobs, rows.confidence))
        stopped = torch.isin(rows.tokens[slots, [count - 1 for count in counts]], self.eos).tolist()
        samples = []
        for row, (slot, count) in enumerate(zip(slots, counts, strict=True)):
            if not torch.isfinite(logprobs[row, :count]).all():
                raise RuntimeError(
                    f"the model gave a log-prob that is not finite (weight version {weight_version}); "
                    "its weights or activations have overflowed"
                )
            reason: FinishReason = "stop" if stopped[row] else "length"
            samples.append(
                Sample(
                    completion_ids=tokens[row, :count].clone(),
                    logprobs=logprobs[row, :count].clone(),
                    finish_reason=reason,
                    weight_version=weight_version,
                    routing_confidence=(confidence[row] / count).float() if confidence.shape[1] else None,
                    routed_experts=None
                    if self.experts is None
                    else self.experts[slot, : int(self.length[slot]) - 1].clone(),
                )
            )
        return samples

    def release(self, slots: list[int]) -> tuple[list[int], list[int]]:
        """Drop these slots, ascending, and close the gaps with the last running ones.

        Returns (sources, targets): the cache has to move the same way.
        """
        left = self.count - len(slots)
        gone = set(slots)
        targets = [slot for slot in slots if slot < left]
        sources = [slot for slot in range(left, self.count) if slot not in gone]
        if targets:
            if self.experts is not None:
                self.experts[targets, : self.longest] = self.experts[sources, : self.longest]
            for state in (self.length, *vars(self.rows).values()):
                state[targets] = state[sources]
            for source, target in zip(sources, targets, strict=True):
                self.tickets[target] = self.tickets[source]
        self.count = left
        del self.tickets[left:]
        return sources, targets
