"""The decode loop: running sequences in slots, refilled as they finish."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from contextlib import nullcontext

import torch

from model.moe.routers import RoutingRecorder
from rollouts.engine import Request, Sample
from rollouts.native.cache import SlotCache
from rollouts.native.decoder import Decoder
from rollouts.native.slots import SlotTable

ROUTING_STEPS = 32
"""Decode steps between two evaluations of the routers' records: fewer small kernels, bounded memory.

`advance` also returns after this many steps if nothing has finished.
"""

Waiting = deque[tuple[int, Request]]
"""Tickets and requests that no slot has taken yet, the oldest first."""


class Running:
    """The sequences that run until the engine is idle again, with the buffers they need.

    waiting: the requests that are known now; buffers start at the size that these need, and grow for later ones.
    slots, prefill_tokens, record_experts: see `NativeEngine`.
    """

    def __init__(
        self, decoder: Decoder, waiting: Waiting, *, slots: int, prefill_tokens: int, record_experts: bool
    ) -> None:
        self.decoder = decoder
        self.slots = slots
        self.prefill_tokens = prefill_tokens
        self.record_experts = record_experts
        count, width, longest = min(slots, len(waiting)), *_room([request for _, request in waiting])
        device = decoder.embeddings.device
        self.table = SlotTable(count, width, longest, decoder.routers, decoder.eos_token_ids, device)
        self.cache = SlotCache(decoder.windows, count, longest)
        self.routing = RoutingRecorder(decoder.model) if decoder.routers else None
        self.unread = 0

    def advance(self, waiting: Waiting, weight_version: int) -> list[tuple[int, Sample]]:
        """Sample until a sequence has finished, and return (ticket, sample) of all that finished at that step.

        Takes requests from `waiting` as slots become free. Returns [] if nothing has ended for `ROUTING_STEPS` steps,
        or if nothing is left.
        """
        table = self.table
        with self.routing or nullcontext():
            while waiting or table.count:
                self._more_slots(len(waiting))
                # A prefill costs about as much as a decode step: wait until an eighth of the slots is free.
                refill = bool(waiting) and (table.free >= max(1, table.slots // 8) or not table.count)
                ended = self._prefill(waiting) if refill else self._decode()
                if ended:
                    self._read_routing()
                    tickets = [table.tickets[slot] for slot in ended]
                    samples = table.samples(ended, weight_version)
                    self._release(ended)
                    return list(zip(tickets, samples, strict=True))
                if not refill and not self.unread:
                    break
        return []

    def drop(self, tickets: Collection[int]) -> None:
        """Forget running sequences; unknown tickets are ignored."""
        slots = [slot for slot, ticket in enumerate(self.table.tickets) if ticket in tickets]
        if slots:
            self._read_routing()
            self._release(slots)

    def _more_slots(self, waiting: int) -> None:
        """Make room for requests that came after the first ones."""
        wanted = min(self.slots, self.table.count + waiting)
        if wanted > self.table.slots:
            self._grow(min(self.slots, max(wanted, 2 * self.table.slots)), 0, 0)

    def _grow(self, slots: int, width: int, longest: int) -> None:
        self.table.grow(slots, width, longest)
        self.cache.grow(self.table.slots, self.table.positions)

    def _release(self, slots: list[int]) -> None:
        longest = self.table.longest
        sources, targets = self.table.release(slots)
        if targets:
            self.cache.move(sources, targets, longest)

    def _prefill(self, waiting: Waiting) -> list[int]:
        """Admit waiting requests; returns the slots that have finished with their first token."""
        self._read_routing()
        table, decoder = self.table, self.decoder
        tickets, requests = self._next(waiting)
        self._grow(table.slots, *_room(requests))
        start = table.count
        table.admit(tickets, requests)
        lengths = table.rows.prompt[start : table.count]
        ids = decoder.padded([request.prompt_ids for request in requests])
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        masks = self.cache.prefill(start, lengths, ids.shape[1])
        hidden = decoder.forward(ids, positions, masks, self.cache)
        rows = torch.arange(len(requests), device=ids.device)
        routing = self.routing.take() if self.routing is not None else None
        if routing is not None:
            confidence = routing.confidence.view(-1, *ids.shape)
            table.rows.confidence[start : table.count] = confidence[:, rows, lengths - 1].T.double()
            if self.record_experts:
                experts = routing.experts.view(len(confidence), *ids.shape, -1)
                table.route(slice(start, table.count), torch.zeros_like(lengths), experts)
        return table.record(start, decoder.head(hidden[rows, lengths - 1]))

    def _next(self, waiting: Waiting) -> tuple[list[int], list[Request]]:
        """Take as many waiting requests, in order, as fit into the free slots and one forward."""
        tickets: list[int] = []
        requests: list[Request] = []
        width = 0
        while waiting and len(requests) < self.table.free:
            width = max(width, len(waiting[0][1].prompt_ids))
            if requests and width * (len(requests) + 1) > self.prefill_tokens:
                break
            ticket, request = waiting.popleft()
            tickets.append(ticket)
            requests.append(request)
        return tickets, requests

    def _decode(self) -> list[int]:
        """Run one token of every sequence; returns the slots that have finished."""
        ids, positions = self.table.current()
        masks = self.cache.decode(positions[:, 0], self.table.longest)
        hidden = self.decoder.forward(ids, positions, masks, self.cache)
        ended = self.table.record(0, self.decoder.head(hidden[:, -1]))
        self.unread += 1
        if self.unread == ROUTING_STEPS:
            self._read_routing()
        return ended

    def _read_routing(self) -> None:
        """Add the confidence of the decode steps since the last reading; the batch was the same in all."""
        routing = self.routing.take() if self.routing is not None and self.unread else None
        if routing is not None:
            count = self.table.count
            steps = routing.confidence.view(-1, self.unread, count)
            self.table.rows.confidence[:count] += steps.sum(1, dtype=torch.float64).T
            if self.record_experts:
                experts = routing.experts.view(len(steps), self.unread, count, -1).transpose(1, 2)
                # The newest token is not cached yet: the last forward was at the position before it.
                self.table.route(slice(0, count), self.table.length[:count] - 1 - self.unread, experts)
        self.unread = 0


def _room(requests: Sequence[Request]) -> tuple[int, int]:
    """Return (generated tokens, positions) that the largest of these requests can take."""
    return (
        max(request.max_new_tokens for request in requests),
        max(len(request.prompt_ids) + request.max_new_tokens for request in requests),
    )
