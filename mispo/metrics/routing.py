"""Routing metrics of a step: how sure the routers are, how evenly experts are used, and whether the engine agrees."""

from __future__ import annotations

import torch
from torch import Tensor

from mispo.algorithm.quantiles import quantiles
from mispo.algorithm.segments import Reduce

LOW_SHARE = 0.1
"""Share of a run's first tokens that count as low-confidence, in each MoE layer."""


def routing_metrics(
    confidence_LN: Tensor,
    margin_LN: Tensor | None,
    experts_LNk: Tensor,
    *,
    own_LNk: Tensor,
    rollout_LNk: Tensor | None,
    num_experts: int,
    low_L: Tensor | None,
    reduce: Reduce,
) -> dict[str, float]:
    """Compute metrics over the generated tokens of all ranks, each per MoE layer (…/layer_{i}) and over the layers.

    confidence_LN: probability mass of the activated experts, float32. margin_LN: gap between the k-th and the (k+1)-th
    selection score. experts_LNk: the activated experts, of any integer type; own_LNk: those that the trainer's router
    chose by itself; rollout_LNk: those that the rollout engine activated. low_L: `low_thresholds`. N may be 0 and
    differ between ranks; what is None must be None on all of them. Every rank must call this, as it reduces once.

    - moe/confidence/mean, and moe/confidence_norm/mean: (Σ_k − k/E)/(1 − k/E); below 0 it stays below 0
    - moe/low_confidence/mean: share of tokens with a confidence below low_L; absent without low_L
    - moe/margin/mean; absent without margins
    - moe/max_violation: largest expert load / mean load − 1, of the worst layer; its layers: moe/violation/layer_{i}
    - moe/dead_experts: experts that no token used, counted over all layers
    - moe/expert_agreement: mean of |own ∩ rollout|/k over tokens and layers; absent without rollout_LNk

    Without any token on any rank all of them are NaN.
    """
    layers, tokens = confidence_LN.shape
    assert layers >= 1, "a dense model has no routing metrics"
    assert experts_LNk.shape[:2] == (layers, tokens), "experts must be [L, N, k] for a confidence [L, N]"
    sums = _sums(confidence_LN, margin_LN, own_LNk, rollout_LNk, low_L)
    # Everything at once: [L, one column per mean, then the load of E experts, then the tokens].
    columns_LX = [*(x_L.double()[:, None] for x_L in sums.values()), _load(experts_LNk, num_experts)]
    columns_LX.append(torch.full((layers, 1), float(tokens), dtype=torch.float64, device=confidence_LN.device))
    all_LX = reduce(torch.cat(columns_LX, 1)).cpu()
    tokens_L, load_LE = all_LX[:, -1], all_LX[:, len(sums) : -1]
    means = {name: all_LX[:, i] / tokens_L for i, name in enumerate(sums)}
    means["confidence_norm"] = normalised(means["confidence"], experts_LNk.shape[2] / num_experts)
    if low_L is not None:
        means["low_confidence"][low_L.cpu().isnan()] = torch.nan  # no threshold: nothing can be below it
    violation_L = load_LE.amax(1) / load_LE.mean(1) - 1
    dead_L = (load_LE == 0).sum(1).double().where(tokens_L > 0, torch.nan)
    return _named(means, violation_L, dead_L)


def _sums(
    confidence_LN: Tensor, margin_LN: Tensor | None, own_LNk: Tensor, rollout_LNk: Tensor | None, low_L: Tensor | None
) -> dict[str, Tensor]:
    """Return sums over this rank's tokens, [L] each, by the names of their means."""
    sums = {"confidence": confidence_LN.sum(1, dtype=torch.float64)}
    if margin_LN is not None:
        sums["margin"] = margin_LN.sum(1, dtype=torch.float64)
    if low_L is not None:
        sums["low_confidence"] = (confidence_LN < low_L.to(confidence_LN)[:, None]).sum(1)
    if rollout_LNk is not None:
        pairs = zip(own_LNk, rollout_LNk, strict=True)
        sums["expert_agreement"] = torch.stack([agreement(own_Nk, seen_Nk).double().sum() for own_Nk, seen_Nk in pairs])
    return sums


def _named(means: dict[str, Tensor], violation_L: Tensor, dead_L: Tensor) -> dict[str, float]:
    """Return metrics over the layers, then those of each layer. means: [L] each."""
    agreed_L = means.pop("expert_agreement", None)
    metrics = {f"moe/{name}/mean": x_L.mean().item() for name, x_L in means.items()}
    metrics |= {"moe/max_violation": violation_L.max().item(), "moe/dead_experts": dead_L.sum().item()}
    by_layer = means | {"violation": violation_L, "dead_experts": dead_L}
    if agreed_L is not None:
        metrics["moe/expert_agreement"] = agreed_L.mean().item()
        by_layer["expert_agreement"] = agreed_L
    return metrics | {f"moe/{name}/layer_{i}": x for name, x_L in by_layer.items() for i, x in enumerate(x_L.tolist())}


def normalised(confidence: Tensor, chance: float) -> Tensor:
    """Return (Σ_k − k/E)/(1 − k/E), comparable between models; not clipped; NaN where all experts are active.

    chance: k/E, the mass of k experts under a uniform router. With a selection bias, or under replay, a token may lie
    below it.
    """
    return (confidence - chance) / (1 - chance) if chance < 1 else torch.full_like(confidence, torch.nan)


def low_thresholds(confidence_LN: Tensor, reduce: Reduce, share: float = LOW_SHARE) -> Tensor:
    """Return the confidence that this share of all ranks' tokens lies below, per MoE layer, [L] float32.

    Fitted once, in the first step of a run, so that moe/low_confidence shows how the run has moved since. Of equal
    confidences none is below: the share is then smaller. NaN without tokens. Every rank must call
    it.
    """
    return quantiles(confidence_LN, torch.tensor([share], dtype=torch.float64), reduce)[:, 0]


def expert_load(experts_LNk: Tensor, num_experts: int, reduce: Reduce) -> Tensor:
    """Count how many of all ranks' tokens activated each expert, [L, E] float64, on the ids' device."""
    return reduce(_load(experts_LNk, num_experts))


def agreement(own_Nk: Tensor, rollout_Nk: Tensor) -> Tensor:
    """Return the share of a token's experts that both activated, |own ∩ rollout|/k, [N] float32.

    Both have k experts, distinct within a token, of any integer type.
    """
    assert own_Nk.shape == rollout_Nk.shape, f"{tuple(own_Nk.shape)} and {tuple(rollout_Nk.shape)} do not compare"
    # Tokens last: comparing and adding along N is ten times as fast as along k.
    kind = torch.promote_types(own_Nk.dtype, rollout_Nk.dtype)
    own_kN, rollout_kN = (ids.T.to(kind).contiguous() for ids in (own_Nk, rollout_Nk))
    shared_kN = torch.zeros_like(own_kN, dtype=torch.uint8)
    for ids_N in own_kN:
        shared_kN += rollout_kN == ids_N
    return shared_kN.sum(0, dtype=torch.float32) / len(own_kN)


def mean_agreement(own_LNk: Tensor, rollout_LNk: Tensor) -> Tensor:
    """Return `agreement` of each token, averaged over the MoE layers, [N] float32."""
    total_N = torch.zeros(own_LNk.shape[1], device=own_LNk.device)
    for own_Nk, rollout_Nk in zip(own_LNk, rollout_LNk, strict=True):
        total_N += agreement(own_Nk, rollout_Nk)
    return total_N / len(own_LNk)


def _load(experts_LNk: Tensor, num_experts: int) -> Tensor:
    loads = [torch.bincount(ids.flatten().long(), minlength=num_experts) for ids in experts_LNk]
    assert all(len(load) == num_experts for load in loads), f"an expert id is not below {num_experts}"
    return torch.stack(loads).double()


def rollout_confidence(routing_confidence: Tensor, lengths: Tensor, reduce: Reduce) -> dict[str, float]:
    """Return moe/rollout_confidence/mean: what the rollout engine saw, each trajectory weighted by its tokens.

    routing_confidence [B, L]: mean over each trajectory's generated tokens; lengths [B]: their number.
    B may be 0; NaN without any token on any rank.
    """
    weights = lengths.double()
    sums = torch.stack([(routing_confidence.double().mean(dim=1) * weights).sum(), weights.sum()])
    weighted, tokens = reduce(sums).tolist()
    return {"moe/rollout_confidence/mean": weighted / tokens if tokens else float("nan")}
