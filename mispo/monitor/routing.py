"""Routing metrics of a step: how sure the routers are, and how evenly the experts are used."""

from __future__ import annotations

import torch
from torch import Tensor

from mispo.algorithm.segments import Reduce


def routing_metrics(confidence: Tensor, experts: Tensor, num_experts: int, reduce: Reduce) -> dict[str, float]:
    """Metrics over the generated tokens of all ranks.

    confidence [L, N]: probability mass of the activated experts, per MoE layer and token.
    experts [L, N, k]: ids of the activated experts, any integer type. N may be 0 and differ between
    ranks; every rank must call this, as it reduces once.

    - moe/confidence/mean and moe/confidence/layer_{i}, i = position among the MoE layers
    - moe/max_violation: largest expert load / mean load − 1, the worst layer; 0 = perfectly even
    - moe/dead_experts: experts, counted over all layers, that no token used

    Without any token on any rank all of them are NaN.
    """
    layers, tokens = confidence.shape
    assert layers >= 1, "a dense model has no routing metrics"
    assert experts.shape[:2] == (layers, tokens), "experts must be [L, N, k] for a confidence [L, N]"
    loads = [torch.bincount(ids.flatten().long(), minlength=num_experts) for ids in experts]
    assert all(len(load) == num_experts for load in loads), f"an expert id is not below {num_experts}"
    sums = torch.cat(
        [
            confidence.double().sum(dim=1),
            torch.stack(loads).flatten().double(),
            torch.tensor([tokens], dtype=torch.float64, device=confidence.device),
        ]
    )
    sums = reduce(sums).cpu()
    per_layer = sums[:layers] / sums[-1]
    load = sums[layers:-1].view(layers, num_experts)
    violation = (load.amax(dim=1) / load.mean(dim=1) - 1).max()
    dead = (load == 0).sum() if sums[-1] > 0 else torch.tensor(float("nan"))
    return {
        "moe/confidence/mean": per_layer.mean().item(),
        **{f"moe/confidence/layer_{i}": value.item() for i, value in enumerate(per_layer)},
        "moe/max_violation": violation.item(),
        "moe/dead_experts": float(dead),
    }


def rollout_confidence(routing_confidence: Tensor, lengths: Tensor, reduce: Reduce) -> dict[str, float]:
    """moe/rollout_confidence/mean: what the rollout engine saw, each trajectory weighted by its tokens.

    routing_confidence [B, L]: mean over each trajectory's generated tokens; lengths [B]: their number.
    B may be 0; NaN without any token on any rank.
    """
    weights = lengths.double()
    sums = torch.stack([(routing_confidence.double().mean(dim=1) * weights).sum(), weights.sum()])
    weighted, tokens = reduce(sums).tolist()
    return {"moe/rollout_confidence/mean": weighted / tokens if tokens else float("nan")}
