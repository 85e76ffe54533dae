"""Batches made by hand, and an engine without an optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mispo.trainer.batch import Batch, ungraded
from mispo.trainer.engine import Update
from mispo.trainer.ranks import Ranks


def batch_of(lengths: list[int], prompt: int = 2) -> Batch:
    """Trajectories whose tokens are 100·b, 100·b + 1, …"""
    return ungraded(
        [100 * b + torch.arange(length) for b, length in enumerate(lengths)],
        [torch.arange(prompt - 1, length - 1) for length in lengths],
    )


class Plain:
    """An engine without an optimizer: gradients stay where they are, to be looked at."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.ranks = Ranks(0, 1, torch.device("cpu"))
        self.forwards = 0

    def forward(self, *arguments: Any) -> Any:
        self.forwards += 1
        return self.module(*arguments)

    def update(self, losses: Sequence[Callable[[], Tensor]], *, partial: bool = False) -> Update:
        self.module.zero_grad()
        total = 0.0
        for compute in losses:
            loss = compute()
            loss.backward()
            total += loss.item()
        return Update(total, 0.0, 0.0, False)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.module.named_parameters() if p.grad is not None}

    def eval(self) -> None:
        self.module.eval()
