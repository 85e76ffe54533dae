"""Ranks without processes: threads that wait for each other in every collective."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mispo.trainer.ranks import Ranks

T = TypeVar("T")


class Meeting:
    """Where `count` threads exchange what each has brought."""

    def __init__(self, count: int) -> None:
        self.barrier = Barrier(count, timeout=60)
        self.box: list[Any] = [None] * count

    def exchange(self, rank: int, item: T) -> list[T]:
        self.box[rank] = item
        self.barrier.wait()
        items = list(self.box)
        self.barrier.wait()
        return items


class ThreadRanks(Ranks):
    """`Ranks` whose collectives are a `Meeting` of threads."""

    meeting: Meeting

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        stacked = torch.stack(self.meeting.exchange(self.rank, tensor))
        return stacked.sum(0) if operation == dist.ReduceOp.SUM else stacked.amax(0)

    def concatenate(self, items: list[T]) -> list[T]:
        return [item for box in self.meeting.exchange(self.rank, items) for item in box]


def in_ranks(count: int, work: Callable[[int, Callable[[Tensor], Tensor]], T]) -> list[T]:
    """What work(rank, reduce) returns on each of `count` ranks; fails where they reduce unequally often."""
    return on_ranks(count, lambda ranks: work(ranks.rank, ranks.sum))


def on_ranks(count: int, work: Callable[[Ranks], T]) -> list[T]:
    """What work(ranks) returns on each of `count` ranks; fails where they meet unequally often."""
    meeting = Meeting(count)

    def rank(number: int) -> T:
        ranks = ThreadRanks(number, count, torch.device("cpu"))
        object.__setattr__(ranks, "meeting", meeting)  # the dataclass is frozen
        return work(ranks)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(rank, range(count)))
