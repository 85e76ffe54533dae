"""Weights of some updates ago."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mispo.trainer.history import WeightHistory
from mispo.trainer.policy import ActorModule
from mispo.trainer.publish import Publisher
from model.build import build_policy
from support.batches import Plain


def push(history: WeightHistory, *versions: int) -> None:
    for version in versions:
        history.push(version, {"w": torch.full((2,), float(version))})


def stale_version(history: WeightHistory) -> int:
    version, weights = history.stale()
    assert torch.equal(weights["w"], torch.full((2,), float(version)))
    return version


@pytest.mark.parametrize(("staleness", "expected"), [(0, [0, 4, 8, 12]), (4, [0, 0, 4, 8]), (6, [0, 0, 0, 4])])
def test_gives_the_weights_of_that_many_updates_ago(staleness: int, expected: list[int]) -> None:
    history = WeightHistory(staleness)
    seen = []
    for version in (0, 4, 8, 12):
        push(history, version)
        seen.append(stale_version(history))
    assert seen == expected


def test_keeps_only_what_can_still_be_asked_for() -> None:
    history = WeightHistory(2)
    push(history, 0, 1, 2, 3, 4)
    assert history.versions == [2, 3, 4]


def test_snapshots_are_copies() -> None:
    weights = {"w": torch.zeros(2)}
    history = WeightHistory(1)
    history.push(0, weights)
    weights["w"] += 1
    history.push(1, weights)
    assert history.stale()[1]["w"].tolist() == [0.0, 0.0]


def test_misuse_is_caught() -> None:
    history = WeightHistory(1)
    push(history, 3)
    with pytest.raises(AssertionError, match="rise"):
        push(history, 3)


def test_old_weights_are_of_no_use_to_a_run_that_no_longer_lags() -> None:
    """A run that lagged continues with rollout.lag=0, and its next checkpoint can be written."""
    policy, _ = build_policy("micro", None, seed=0)
    engine: Any = Plain("actor", ActorModule(policy, torch.float32))
    engine.updates, engine.engine = 8, SimpleNamespace(zero_optimization_stage=lambda: 0)
    probe = [torch.arange(7, 15)]
    made = {"probe": probe, "packed": False, "temperature": 1.0, "convert": lambda weights: weights}
    lagging = Publisher(engine, WeightHistory(4), **made)
    lagging.record()
    current = Publisher(engine, WeightHistory(0), **made)
    current.restore(lagging.tensors())
    assert current.due().version == 8
    assert current.tensors() == {}
