"""Batches made by hand, and an engine without an optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mispo.algorithm.filter import FixedFilter, Selection, keep_all
from mispo.algorithm.loss import no_correction
from mispo.algorithm.method import Method, Targets, ValueTargets, within_group
from mispo.algorithm.objective import Objective, Samples
from mispo.algorithm.segments import offsets_of
from mispo.trainer.batch import Batch, Layout
from mispo.trainer.engine import Update
from mispo.trainer.ranks import Ranks
from mispo.trainer.update import UpdateSettings


def batch_of(lengths: list[int], prompt: int = 2) -> Batch:
    """Trajectories whose tokens are 100·b, 100·b + 1, …"""
    return made_batch(
        [100 * b + torch.arange(length) for b, length in enumerate(lengths)],
        [torch.arange(prompt - 1, length - 1) for length in lengths],
    )


def made_batch(ids: list[Tensor], columns: list[Tensor], **fields: Any) -> Batch:
    """A batch without trajectories behind it: no rewards, all included, rollout log-probs 0, unless fields say so."""
    count = len(ids)
    offsets = offsets_of(torch.tensor([len(c) for c in columns], dtype=torch.int64))
    given = {
        "step": 1,
        "ranks": Ranks(0, 1, torch.device("cpu")),
        "trajectories": [None] * count,
        "rollout_logprobs_N": torch.zeros(int(offsets[-1])),
        "rewards_B": torch.zeros(count),
        "penalties_B": torch.zeros(count),
        "truncated_B": torch.zeros(count, dtype=torch.bool),
        "included_B": torch.ones(count, dtype=torch.bool),
        "lags_B": torch.zeros(count, dtype=torch.int64),
        "position_B": torch.arange(count),
        "total": count,
        "samples_per_prompt": 1,
    }
    return Batch(ids=ids, columns=columns, offsets_B1=offsets, **(given | fields))


def method_of(objective: Objective) -> Method:
    """A method that keeps everything, with this objective."""
    return Method(
        filter=FixedFilter(keep_all),
        correct=no_correction,
        objective=objective,
        advantage=within_group("group_mean"),
        truncation="zero",
        reward_range=(0.0, 1.0),
        whitens=False,
        rechecks=False,
        learns_truncated=True,
        gamma=1.0,
    )


def settings_of(layout: Layout, **fields: Any) -> UpdateSettings:
    """One mini-batch of everything at temperature 0.8, unless fields say otherwise."""
    given = {
        "seed": 0,
        "temperature": 0.8,
        "actor_minibatches": 1,
        "critic_minibatches": 1,
        "value_clip": None,
        "value_weight": 1.0,
        "mtp_weight": 0.0,
    }
    return UpdateSettings(layout=layout, **(given | fields))


def targets_of(samples: Samples, values: ValueTargets | None = None) -> Targets:
    """What a step teaches, of which only samples and values are read by the updates."""
    log_x_N = torch.zeros(len(samples.weights), dtype=torch.float64)
    none = Selection(samples.weights > 0, torch.ones(0, dtype=torch.int64), torch.zeros(0))
    return Targets(samples, values, none, log_x_N)


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
