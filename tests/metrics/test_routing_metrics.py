"""Routing metrics by hand, against plain Python, over ranks, and without a token; trajectories as parquet."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from mispo.metrics.routing import (
    agreement,
    expert_load,
    low_thresholds,
    mean_agreement,
    rollout_confidence,
    routing_metrics,
)
from support.threads import in_ranks


@dataclass(frozen=True)
class Routed:
    """What a rank knows about its tokens."""

    confidence_LN: Tensor
    margin_LN: Tensor | None
    experts_LNk: Tensor
    own_LNk: Tensor
    rollout_LNk: Tensor | None
    low_L: Tensor | None
    num_experts: int

    def metrics(self, reduce: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, float]:
        return routing_metrics(**vars(self), reduce=reduce)

    def tokens(self, chosen: slice) -> "Routed":
        """The same with a part of the tokens."""
        names = ("confidence_LN", "margin_LN", "experts_LNk", "own_LNk", "rollout_LNk")
        return replace(self, **{name: getattr(self, name)[:, chosen] for name in names})


BY_HAND = Routed(
    confidence_LN=torch.tensor([[0.2, 0.4, 0.6, 0.8], [1.0, 1.0, 1.0, 1.0]]),
    margin_LN=torch.tensor([[0.0, 0.1, 0.2, 0.3], [0.5, 0.5, 0.5, 0.5]]),
    experts_LNk=torch.tensor([[[0, 1], [0, 1], [0, 2], [0, 1]], [[0, 1], [2, 3], [0, 1], [2, 3]]], dtype=torch.uint8),
    own_LNk=torch.tensor([[[0, 1], [0, 1], [0, 2], [0, 1]], [[0, 1], [2, 3], [0, 1], [2, 3]]], dtype=torch.uint8),
    rollout_LNk=torch.tensor([[[1, 0], [0, 3], [1, 3], [0, 1]], [[1, 0], [3, 2], [0, 1], [2, 3]]]),
    low_L=torch.tensor([0.5, 1.0]),
    num_experts=4,
)


def some(layers: int, tokens: int, count: int, experts: int, seed: int = 0) -> Routed:
    """Random routing; the rollout disagrees here and there."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(layers, tokens, experts, generator=generator)
    noisy = scores + 0.1 * torch.randn(scores.shape, generator=generator)
    ids = scores.topk(count).indices
    return Routed(
        confidence_LN=scores.softmax(-1).gather(2, ids).sum(2),
        margin_LN=torch.rand(layers, tokens, generator=generator),
        experts_LNk=ids,
        own_LNk=ids,
        rollout_LNk=noisy.topk(count).indices.to(torch.int16),
        low_L=torch.full((layers,), count / experts * 1.2),
        num_experts=experts,
    )


def reference(routed: Routed) -> dict[str, float]:
    """The definitions in plain Python, in float64."""
    layers, tokens, count = routed.experts_LNk.shape
    chance, experts = count / routed.num_experts, range(routed.num_experts)
    by_layer: dict[str, list[float]] = {}
    for layer in range(layers):
        confidence, margin = routed.confidence_LN[layer].tolist(), routed.margin_LN[layer].tolist()
        chosen, own = routed.experts_LNk[layer].tolist(), routed.own_LNk[layer].tolist()
        seen, low = routed.rollout_LNk[layer].tolist(), routed.low_L[layer].item()
        load = [sum(expert in ids for ids in chosen) for expert in experts]
        values = {
            "confidence": sum(confidence) / tokens,
            "confidence_norm": (sum(confidence) / tokens - chance) / (1 - chance),
            "low_confidence": sum(x < low for x in confidence) / tokens,
            "margin": sum(margin) / tokens,
            "violation": max(load) / (sum(load) / len(load)) - 1,
            "dead_experts": float(sum(number == 0 for number in load)),
            "expert_agreement": sum(len(set(a) & set(b)) / count for a, b in zip(own, seen, strict=True)) / tokens,
        }
        for name, value in values.items():
            by_layer.setdefault(name, []).append(value)
    expected = {f"moe/{name}/layer_{i}": x for name, values in by_layer.items() for i, x in enumerate(values)}
    for name in ("confidence", "confidence_norm", "low_confidence", "margin"):
        expected[f"moe/{name}/mean"] = sum(by_layer[name]) / layers
    expected["moe/max_violation"] = max(by_layer["violation"])
    expected["moe/dead_experts"] = sum(by_layer["dead_experts"])
    return expected | {"moe/expert_agreement": sum(by_layer["expert_agreement"]) / layers}


def test_each_metric_by_hand() -> None:
    """Layer 0 loads 4, 3, 1, 0 (mean 2); layer 1 is perfectly even. Chance is 2 of 4."""
    metrics = BY_HAND.metrics()
    assert metrics == pytest.approx(
        {
            "moe/confidence/mean": 0.75,
            "moe/confidence/layer_0": 0.5,
            "moe/confidence/layer_1": 1.0,
            "moe/confidence_norm/mean": 0.5,
            "moe/confidence_norm/layer_0": 0.0,
            "moe/confidence_norm/layer_1": 1.0,
            "moe/low_confidence/mean": 0.25,
            "moe/low_confidence/layer_0": 0.5,
            "moe/low_confidence/layer_1": 0.0,
            "moe/margin/mean": 0.325,
            "moe/margin/layer_0": 0.15,
            "moe/margin/layer_1": 0.5,
            "moe/max_violation": 1.0,
            "moe/violation/layer_0": 1.0,
            "moe/violation/layer_1": 0.0,
            "moe/dead_experts": 1.0,
            "moe/dead_experts/layer_0": 1.0,
            "moe/dead_experts/layer_1": 0.0,
            "moe/expert_agreement": (1 + 0.5 + 0 + 1 + 4) / 8,
            "moe/expert_agreement/layer_0": 0.625,
            "moe/expert_agreement/layer_1": 1.0,
        },
        abs=1e-6,
    )
    assert expert_load(BY_HAND.experts_LNk, 4, lambda x: 2 * x).tolist() == [[8, 6, 2, 0], [4, 4, 4, 4]]


@pytest.mark.parametrize(("layers", "tokens", "count", "experts"), [(1, 1, 1, 2), (3, 500, 2, 8), (2, 300, 8, 288)])
def test_metrics_agree_with_plain_python(layers: int, tokens: int, count: int, experts: int) -> None:
    routed = some(layers, tokens, count, experts)
    assert routed.metrics() == pytest.approx(reference(routed), abs=1e-6)


@pytest.mark.parametrize("whole", [BY_HAND, some(3, 100, 2, 8)])
def test_ranks_with_unequal_numbers_of_tokens_give_the_metrics_of_all_tokens(whole: Routed) -> None:
    parts = [whole.tokens(slice(0, 1)), whole.tokens(slice(1, 1)), whole.tokens(slice(1, None))]
    for metrics in in_ranks(3, lambda rank, reduce: parts[rank].metrics(reduce)):
        assert metrics == pytest.approx(whole.metrics(), abs=1e-12)


def test_what_was_not_recorded_has_no_metric() -> None:
    metrics = replace(BY_HAND, margin_LN=None, rollout_LNk=None, low_L=None).metrics()
    assert not [key for key in metrics if "margin" in key or "agreement" in key or "low" in key]
    assert metrics == {key: value for key, value in BY_HAND.metrics().items() if key in metrics}


def test_without_a_token_there_is_no_number() -> None:
    metrics = BY_HAND.tokens(slice(0, 0)).metrics()
    assert metrics.keys() == BY_HAND.metrics().keys()
    assert all(math.isnan(value) for value in metrics.values())
    empty = rollout_confidence(torch.empty(0, 2), torch.empty(0), lambda x: x)
    assert math.isnan(empty["moe/rollout_confidence/mean"])


def test_below_chance_is_told_and_not_clipped() -> None:
    """A selection bias or replay activates experts that the scores would not."""
    metrics = replace(BY_HAND, confidence_LN=torch.full((2, 4), 0.25)).metrics()
    assert metrics["moe/confidence_norm/mean"] == pytest.approx(-0.5)
    whole = torch.arange(4).expand(1, 3, 4)
    routed = Routed(torch.ones(1, 3), None, whole, whole, whole, None, 4)
    assert math.isnan(routed.metrics()["moe/confidence_norm/mean"]), "every expert is active: nothing to be sure of"


def test_agreement_compares_sets_of_any_integer_type() -> None:
    for own, rollout in ((torch.uint8, torch.int16), (torch.int64, torch.uint8), (torch.int32, torch.int32)):
        found = agreement(BY_HAND.own_LNk[0].to(own), BY_HAND.rollout_LNk[0].to(rollout))
        assert found.tolist() == [1.0, 0.5, 0.0, 1.0]
    assert mean_agreement(BY_HAND.own_LNk, BY_HAND.rollout_LNk).tolist() == [1.0, 0.75, 0.5, 1.0]
    with pytest.raises(AssertionError, match="do not compare"):
        agreement(torch.zeros(4, 2), torch.zeros(4, 3))


def test_a_tenth_of_the_first_tokens_is_low_by_construction() -> None:
    routed = some(3, 1000, 2, 8)
    low_L = low_thresholds(routed.confidence_LN, lambda x: x)
    metrics = replace(routed, low_L=low_L).metrics()
    assert [metrics[f"moe/low_confidence/layer_{i}"] for i in range(3)] == [0.1, 0.1, 0.1]
    assert low_L.tolist() == routed.confidence_LN.sort(dim=1).values[:, 100].tolist()
    assert low_thresholds(torch.ones(2, 50), lambda x: x).tolist() == [1, 1]
    unknown = low_thresholds(torch.empty(2, 0), lambda x: x)
    assert unknown.isnan().all()
    assert math.isnan(replace(BY_HAND, low_L=unknown).metrics()["moe/low_confidence/mean"])


def test_rollout_confidence_weighs_trajectories_by_their_tokens() -> None:
    seen = rollout_confidence(torch.tensor([[0.2, 0.4], [0.8, 1.0]]), torch.tensor([1.0, 3.0]), lambda x: x)
    assert seen == {"moe/rollout_confidence/mean": pytest.approx((0.3 * 1 + 0.9 * 3) / 4)}
