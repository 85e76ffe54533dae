"""Ranks without processes: threads whose reductions wait for each other, for code that only knows a callable."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def in_ranks(count: int, work: Callable[[int, Callable[[Tensor], Tensor]], T]) -> list[T]:
    """What work(rank, reduce) returns on each of `count` ranks; fails where they reduce unequally often."""
    barrier, box = Barrier(count, timeout=60), [torch.tensor(0)] * count

    def rank(number: int) -> T:
        def reduce(x: Tensor) -> Tensor:
            box[number] = x
            barrier.wait()
            total = torch.stack(box).sum(0)
            barrier.wait()
            return total

        return work(number, reduce)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(rank, range(count)))
