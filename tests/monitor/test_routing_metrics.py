"""Routing metrics by hand, over two ranks, and without a token; trajectories as parquet."""

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mispo.monitor.records import save_rollouts, save_samples
from mispo.monitor.routing import rollout_confidence, routing_metrics
from rollouts.trajectory import Prompt, Trajectory

CONFIDENCE = torch.tensor([[0.2, 0.4, 0.6, 0.8], [1.0, 1.0, 1.0, 1.0]])
EXPERTS = torch.tensor([[[0, 1], [0, 1], [0, 2], [0, 1]], [[0, 1], [2, 3], [0, 1], [2, 3]]], dtype=torch.uint8)


def test_confidence_violation_and_dead_experts() -> None:
    """Layer 0 loads 4, 3, 1, 0 (mean 2); layer 1 is perfectly even."""
    metrics = routing_metrics(CONFIDENCE, EXPERTS, 4, lambda x: x)
    assert metrics == {
        "moe/confidence/mean": pytest.approx(0.75),
        "moe/confidence/layer_0": pytest.approx(0.5),
        "moe/confidence/layer_1": pytest.approx(1.0),
        "moe/max_violation": pytest.approx(1.0),
        "moe/dead_experts": 1.0,
    }


def test_ranks_with_unequal_numbers_of_tokens_give_the_metrics_of_all_tokens() -> None:
    parts = [(CONFIDENCE[:, :1], EXPERTS[:, :1]), (CONFIDENCE[:, 1:], EXPERTS[:, 1:])]
    sent: list[torch.Tensor] = []
    for confidence, experts in parts:
        routing_metrics(confidence, experts, 4, lambda x: sent.append(x) or x)  # type: ignore[func-returns-value]
    for confidence, experts in parts:
        metrics = routing_metrics(confidence, experts, 4, lambda x: sent[0] + sent[1])
        assert metrics == pytest.approx(routing_metrics(CONFIDENCE, EXPERTS, 4, lambda x: x))


def test_without_a_token_there_is_no_number() -> None:
    metrics = routing_metrics(CONFIDENCE[:, :0], EXPERTS[:, :0], 4, lambda x: x)
    assert all(math.isnan(value) for value in metrics.values())
    empty = rollout_confidence(torch.empty(0, 2), torch.empty(0), lambda x: x)
    assert math.isnan(empty["moe/rollout_confidence/mean"])


def test_rollout_confidence_weighs_trajectories_by_their_tokens() -> None:
    seen = rollout_confidence(torch.tensor([[0.2, 0.4], [0.8, 1.0]]), torch.tensor([1.0, 3.0]), lambda x: x)
    assert seen == {"moe/rollout_confidence/mean": pytest.approx((0.3 * 1 + 0.9 * 3) / 4)}


def trajectory(index: int) -> Trajectory:
    prompt = Prompt(torch.tensor([5, 6]), "ones in 5?", "2", {}, index)
    return Trajectory(
        prompt=prompt,
        sample=1,
        seed=2**62 + index,
        completion_ids=torch.arange(3) + index,
        action_mask=torch.ones(3, dtype=torch.bool),
        rollout_logprobs=torch.tensor([-0.1, -0.2, -0.3]),
        finish_reason="length",
        weight_version=9,
        routing_confidence=None,
        routed_experts=None,
        completion="<think>5",
        reward=0.5,
        reward_info={"outcome": "ok"},
    )


def test_rollouts_come_back_from_parquet_with_the_callers_columns(tmp_path: Path) -> None:
    path = tmp_path / "rollouts/step_1.parquet"
    save_rollouts(path, [trajectory(0), trajectory(1)], {"multiplicity": [1, 0]})
    first, second = pq.read_table(path).to_pylist()
    assert first["completion_ids"] == [0, 1, 2]
    assert second["seed"] == 2**62 + 1
    assert second["rollout_logprobs"] == pytest.approx([-0.1, -0.2, -0.3])
    assert (first["multiplicity"], second["multiplicity"]) == (1, 0)
    assert (first["finish_reason"], first["weight_version"], first["outcome"]) == ("length", 9, "ok")


def test_samples_without_their_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="lacks answer"):
        save_samples(tmp_path / "s.jsonl", [{"question": "", "completion": "", "reward": 0}])
