"""The table of running sequences: which request sits in which slot, and what it has generated so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rollouts.engine import Request, Sample
from rollouts.native.sampling import pick_tokens, request_uniforms


class SlotTable:
    """State of the slots, one row each; the first `count` rows are running.

    What a step needs lies on `device`; the host knows the lengths by counting along, so that a step costs one
    synchronisation: the list of finished slots.
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
        self.device = device
        self.eos = torch.tensor(list(eos_token_ids), device=device)
        self.count = 0
        self.request: list[int] = []
        self.length = torch.zeros(slots, dtype=torch.int64)

        def rows(dtype: torch.dtype, *width: int) -> Tensor:
            return torch.zeros(slots, *width, dtype=dtype, device=device)

        self.prompt = rows(torch.int64)
        self.generated = rows(torch.int64)
        self.limit = rows(torch.int64)
        self.temperature = rows(torch.float32)
        self.uniforms = rows(torch.float64, max_new_tokens)
        self.tokens = rows(torch.int64, max_new_tokens)
        self.logprobs = rows(torch.float32, max_new_tokens)
        self.confidence = rows(torch.float64, routers)
        # On the host, which has memory for it once it is written: [slots, positions, routers, k].
        self.experts: Tensor | None = None

    @property
    def free(self) -> int:
        """Slots that stand empty."""
        return self.slots - self.count

    @property
    def longest(self) -> int:
        """Tokens of the longest running sequence, prompt and generated; the last one is not cached yet."""
        return int(self.length[: self.count].max())

    def admit(self, indices: Sequence[int], requests: Sequence[Request]) -> None:
        """Append requests (with their place in the caller's list); `record` their first token next."""
        start, stop = self.count, self.count + len(requests)
        lengths = [len(request.prompt_ids) for request in requests]
        self.count = stop
        self.request += indices
        self.length[start:stop] = torch.tensor(lengths)
        self.prompt[start:stop] = self.length[start:stop]
        self.generated[start:stop] = 0
        self.limit[start:stop] = torch.tensor([request.max_new_tokens for request in requests])
        self.temperature[start:stop] = torch.tensor([request.temperature for request in requests])
        for row, request in enumerate(requests, start):
            uniforms = request_uniforms(request.seed, request.max_new_tokens)
            self.uniforms[row, : len(uniforms)] = uniforms

    def current(self) -> tuple[Tensor, Tensor]:
        """The newest token of each running sequence and its position, both [n, 1]; neither is cached yet."""
        last = self.generated[: self.count, None] - 1
        return self.tokens[: self.count].gather(1, last), self.prompt[: self.count, None] + last

    def record(self, start: int, logits: Tensor) -> list[int]:
        """Sample the next token of the slots start … count−1 from logits [count − start, V].

        Returns the slots that have finished, ascending.
        """
        rows = slice(start, self.count)
        at = self.generated[rows, None]
        uniform = self.uniforms[rows].gather(1, at)[:, 0]
        tokens, logprobs = pick_tokens(logits, self.temperature[rows], uniform)
        self.tokens[rows].scatter_(1, at, tokens[:, None])
        self.logprobs[rows].scatter_(1, at, logprobs[:, None])
        self.generated[rows] += 1
        self.length[rows] += 1
        ended = torch.isin(tokens, self.eos) | (self.generated[rows] >= self.limit[rows])
        return [start + row for row in ended.nonzero()[:, 0].tolist()]

    def route(self, rows: slice, first: Tensor, experts_LsSk: Tensor) -> None:
        """Keep which experts were activated: in each of these slots at S positions from `first` [rows] on.

        Positions after a sequence's end are overwritten later, or never read.
        """
        layers, _, width, k = experts_LsSk.shape
        if self.experts is None:
            self.experts = torch.empty(self.slots, self.positions, layers, k, dtype=experts_LsSk.dtype)
        at = first.cpu()[:, None] + torch.arange(width)
        slots = torch.arange(rows.start, rows.stop)[:, None].expand_as(at)
        inside = at < self.positions
        self.experts[slots[inside], at[inside]] = experts_LsSk.cpu().permute(1, 2, 0, 3)[inside]

    def samples(self, rows: list[int], weight_version: int) -> list[Sample]:
        """What the given slots have produced.

        RuntimeError if a log-prob is not finite: the weights are broken, nothing sampled is of use.
        """
        counts = self.generated[rows].tolist()
        tokens = self.tokens[rows].cpu()
        logprobs = self.logprobs[rows].cpu()
        confidence = self.confidence[rows].cpu()
        stopped = torch.isin(self.tokens[rows, [count - 1 for count in counts]], self.eos).tolist()
        samples = []
        for row, count in enumerate(counts):
            if not torch.isfinite(logprobs[row, :count]).all():
                raise RuntimeError(
                    f"the model gave a log-prob that is not finite (weight version {weight_version}); "
                    "its weights or activations have overflowed"
                )
            samples.append(
                Sample(
                    completion_ids=tokens[row, :count].clone(),
                    logprobs=logprobs[row, :count].clone(),
                    finish_reason="stop" if stopped[row] else "length",
                    weight_version=weight_version,
                    routing_confidence=(confidence[row] / count).float() if confidence.shape[1] else None,
                    routed_experts=None
                    if self.experts is None
                    else self.experts[rows[row], : int(self.length[rows[row]]) - 1].clone(),
                )
            )
        return samples

    def release(self, rows: list[int]) -> tuple[list[int], list[int]]:
        """Drop finished slots and close the gaps with the last running ones.

        Returns (sources, targets): the cache has to move the same way.
        """
        left = self.count - len(rows)
        gone = set(rows)
        targets = [row for row in rows if row < left]
        sources = [row for row in range(left, self.count) if row not in gone]
        if targets:
            if self.experts is not None:
                self.experts[targets, : self.longest] = self.experts[sources, : self.longest]
            for state in (
                self.length,
                self.prompt,
                self.generated,
                self.limit,
                self.temperature,
                self.uniforms,
                self.tokens,
                self.logprobs,
                self.confidence,
            ):
                state[targets] = state[sources]
            for source, target in zip(sources, targets, strict=True):
                self.request[target] = self.request[source]
        self.count = left
        del self.request[left:]
        return sources, targets
