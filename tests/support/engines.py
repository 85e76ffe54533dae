"""An engine without a model, that shows what its caller does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from rollouts.engine import Capabilities, Request, Sample

END = 0


class EchoEngine:
    """Answers with the last prompt token, then 1 and the end token; for odd seeds cut by the limit before that.

    One request ends per call, the newest first. log: what has been called, shared with whoever else writes to it.
    """

    can = Capabilities(experts=False, replay=False, loops=False, stop_strings=False)

    def __init__(self, log: list[str] | None = None) -> None:
        self.weight_version = 8
        self.requests: list[Request] = []
        self.running: dict[int, Request] = {}
        self.cancelled: list[int] = []
        self.log = [] if log is None else log
        self.gap = 0.0

    def submit(self, request: Request) -> int:
        if request.max_new_tokens < 1:
            raise ValueError("no tokens are asked for")
        self.requests.append(request)
        self.running[len(self.requests)] = request
        return len(self.requests)

    def finished(self) -> list[tuple[int, Sample]]:
        self.log.append("engine")
        if not self.running:
            return []
        ticket, request = self.running.popitem()
        cut = request.seed % 2 == 1
        ids = torch.cat([request.prompt_ids[-1:], torch.tensor([END, 1] if cut else [1, END])])
        return [(ticket, Sample(ids, -torch.ones(3), "length" if cut else "stop", self.weight_version, None, None))]

    def cancel(self, tickets: Collection[int]) -> None:
        self.cancelled += [ticket for ticket in tickets if self.running.pop(ticket, None)]

    def converted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(weights)

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.weight_version = version

    def score(
        self, pairs: Sequence[tuple[Tensor, Tensor]], temperature: float, experts: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Log-probs 0, but for the first token of each completion, which has −gap."""
        return [torch.cat([torch.tensor([-self.gap]), torch.zeros(len(completion) - 1)]) for _, completion in pairs]

    def sleep(self) -> None:
        raise NotImplementedError

    def wake(self) -> None:
        raise NotImplementedError
