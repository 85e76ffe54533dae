"""Run the largest possible micro-batch once before step 1, so that a lack of memory shows at once."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from mispo.trainer.batch import Layout, Sequences, sequences
from mispo.trainer.engine import TrainEngine


def rehearse(engine: TrainEngine[Any], longest: int, layout: Layout, vocabulary: int) -> float:
    """Run forward and backward over as many trajectories of `longest` tokens as a micro-batch holds; return seconds.

    All tokens are scored. The weights do not change: the loss is multiplied by 0, and the optimizer's states are as
    before. RuntimeError that names the setting if the memory does not suffice.
    """
    count = max(1, layout.tokens // longest)
    start = time.perf_counter()
    try:
        engine.create_states(0 * _loss(engine, worst_batch(count, longest, vocabulary), layout))
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
            raise
        raise RuntimeError(
            f"{engine.name}: out of memory on {count} trajectories of {longest} tokens, forward and backward "
            f"({str(error).splitlines()[0]}); lower trainer.tokens_per_microbatch (at least {longest}), "
            "data.max_prompt_tokens or rollout.max_new_tokens, or raise trainer.zero_stage"
        ) from error
    return time.perf_counter() - start


def worst_batch(count: int, longest: int, vocabulary: int) -> Sequences:
    """Build random trajectories with one prompt token each; the other tokens are completion."""
    ids = torch.randint(vocabulary, (count, longest), generator=torch.Generator().manual_seed(0))
    return sequences(list(ids), [torch.arange(longest - 1)] * count)


def _loss(engine: TrainEngine[Any], batch: Sequences, layout: Layout) -> Tensor:
    engine.engine.train()
    x = layout.input(batch, range(len(batch)), engine.ranks.device)
    if engine.name == "actor":
        return sum(output.sum() for output in engine.forward(x, 1.0) if output is not None)
    return engine.forward(x).sum()
