"""The row of one training step, over all ranks; names as users of other trainers know them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mispo.algorithm.method import Targets
from mispo.algorithm.segments import lengths_of, segment_mean, segment_sum
from mispo.metrics.mismatch import (
    MismatchSums,
    acceptance_metrics,
    mismatch_metrics,
    mismatch_sums,
    ratio_histogram,
)
from mispo.metrics.record import StepRecord
from mispo.metrics.routing import rollout_confidence, routing_metrics
from mispo.trainer.batch import Batch
from mispo.trainer.engine import Update
from mispo.trainer.learner import Updates
from mispo.trainer.ranks import Ranks
from mispo.trainer.scoring import Values
from model.moe.routers import Routing
from rollouts.trajectory import Trajectory


@dataclass(frozen=True)
class About:
    """What metrics need to know of the run. num_experts: of a MoE layer, 0 for a dense model. reward_range: lowest and
    highest reward; trunc/bootstrap_gap, how much more truncated trajectories return than finished ones, is a share of
    it."""

    num_experts: int
    reward_range: tuple[float, float]


def step_metrics(record: StepRecord, updates: Updates, about: About) -> dict[str, float]:
    """Compute everything except times. Collective: every rank calls it with its share, all get the same row."""
    batch, scores, targets = record.batch, record.scores, record.targets
    everyone = batch.everyone
    tokens = float(everyone(lengths_of(batch.offsets_B1)).sum().clamp_min(1))
    metrics = _outcomes(batch)
    metrics["actor/entropy"] = (everyone(segment_sum(scores.policy.entropy_N, batch.offsets_B1)).sum() / tokens).item()
    metrics |= _filter(batch, targets) | _routing(record, about)
    if scores.values is not None and targets.values is not None:
        metrics |= _critic(batch, scores.values, targets.values.targets, metrics, about.reward_range)
        metrics |= _updates("critic", updates.critic)
    metrics |= _updates("actor", updates.actor) | _moved(updates.actor)
    metrics["mis/empty_minibatches"] = float(sum(update is None for update in updates.actor))
    return metrics


def _outcomes(batch: Batch) -> dict[str, float]:
    """reward/*, one of them for each named part, response_length/*, trunc/rate, rollout/lag: how the step ended."""
    everyone = batch.everyone
    lengths_B = everyone(torch.tensor([float(len(t)) for t in batch.trajectories]))
    rewards_B, truncated_B = everyone(batch.rewards_B), everyone(batch.truncated_B.long()).bool()
    failed_B = everyone(torch.tensor([float(t.reward_info["outcome"] != "ok") for t in batch.trajectories]))
    metrics = {
        "reward/mean": rewards_B.mean().item(),
        "reward/failed": failed_B.mean().item(),
        "reward/overlong_penalty": everyone(batch.penalties_B).mean().item(),
        "response_length/mean": lengths_B.mean().item(),
        "response_length/max": lengths_B.max().item(),
        "response_length/clip_ratio": truncated_B.float().mean().item(),
        "trunc/rate": truncated_B.float().mean().item(),
        "rollout/lag": float(everyone(batch.lags_B).max()),
    }
    parts = batch.ranks.concatenate(sorted({name for t in batch.trajectories for name in t.reward_parts}))
    for part in sorted(set(parts)):
        metrics[f"reward/{part}"] = everyone(_part_of(batch, part)).mean().item()
    if not truncated_B.all():
        metrics["reward/finished_mean"] = rewards_B[~truncated_B].mean().item()
    return metrics


def _part_of(batch: Batch, part: str) -> Tensor:
    return torch.tensor([t.reward_parts.get(part, math.nan) for t in batch.trajectories])


def _filter(batch: Batch, targets: Targets) -> dict[str, float]:
    """mismatch/* and mis/*: how far rollout and trainer are apart, and what the filter kept."""
    everyone, selection = batch.everyone, targets.selection
    log_x_N = targets.log_x_N
    sums = mismatch_sums(log_x_N, batch.rollout_logprobs_N, selection.keep_N, batch.offsets_B1)
    sums = MismatchSums(**{name: everyone(x_B) for name, x_B in vars(sums).items()})
    everything = replace(
        selection,
        multiplicity_B=everyone(selection.multiplicity_B),
        log_rho_B=everyone(selection.log_rho_B),
        window_B2=None if selection.window_B2 is None else everyone(selection.window_B2),
    )
    lengths_B = everyone(torch.tensor([float(len(t)) for t in batch.trajectories]))
    return {
        **mismatch_metrics(sums, batch.ranks.sum(ratio_histogram(log_x_N))),
        **acceptance_metrics(everything, lengths_B, everyone(batch.rewards_B), everyone(batch.lags_B)),
    }


def _critic(
    batch: Batch, values: Values, targets_N: Tensor, outcomes: dict[str, float], reward_range: tuple[float, float]
) -> dict[str, float]:
    """critic/vf_explained_var, critic/value_*, trunc/bootstrap_*, before this step's updates. outcomes: `_outcomes`."""
    everyone = batch.everyone
    metrics = _explained(batch.ranks, values, targets_N)
    rewards_B, truncated_B = everyone(batch.rewards_B), everyone(batch.truncated_B.long()).bool()
    values_B = everyone(segment_mean(values.values_N, batch.offsets_B1))
    better_B = rewards_B > rewards_B.mean()
    for name, chosen_B in (("pos", better_B), ("neg", ~better_B)):
        if chosen_B.any():
            metrics[f"critic/value_{name}"] = values_B[chosen_B].mean().item()
    if truncated_B.any():
        bootstrap = everyone(values.bootstrap_B)[truncated_B].mean().item()
        metrics["trunc/bootstrap_mean"] = bootstrap
        if "reward/finished_mean" in outcomes:
            low, high = reward_range
            metrics["trunc/bootstrap_gap"] = (bootstrap - outcomes["reward/finished_mean"]) / (high - low)
    return metrics


def _moved(updates: Sequence[Update | None]) -> dict[str, float]:
    """Over the tokens of the step's updates: how far π_θ had left π_old (k3), the reference, and how many were clipped.

    Whole trajectories that were rejected are not computed and do not count here.
    """
    stats = [update.stats for update in updates if update is not None]
    tokens = sum(found["tokens"] for found in stats)
    if not tokens:
        return {}
    names = {
        "clipped": "actor/clip_frac",
        "kl_old": "actor/kl_old",
        "kl_ref": "actor/kl_ref",
        "draft_nll": "actor/draft_loss",
    }
    return {metric: sum(found[name] for found in stats) / tokens for name, metric in names.items() if name in stats[0]}


def _explained(ranks: Ranks, values: Values, targets_N: Tensor) -> dict[str, float]:
    """Explained variance before this step's updates, from sums over ranks."""
    targets, errors = targets_N.double(), targets_N.double() - values.values_N.double()
    n, t, tt, e, ee, v = ranks.sum(
        torch.stack(
            [
                torch.tensor(float(len(targets)), dtype=torch.float64),
                targets.sum(),
                targets.square().sum(),
                errors.sum(),
                errors.square().sum(),
                values.values_N.double().sum(),
            ]
        )
    ).tolist()
    spread = tt / n - (t / n) ** 2
    explained = 1 - (ee / n - (e / n) ** 2) / spread if spread > 1e-12 else float("nan")
    return {"critic/vf_explained_var": explained, "critic/value_mean": v / n}


def _routing(record: StepRecord, about: About) -> dict[str, float]:
    routing, trajectories, ranks = record.scores.policy.routing, record.batch.trajectories, record.batch.ranks
    if routing is None:
        return {}
    recorded = not ranks.any(any(t.routed_experts is None for t in trajectories))
    seen = [(t.routing_confidence, float(len(t))) for t in trajectories if t.routing_confidence is not None]
    seen_BL = torch.stack([confidence for confidence, _ in seen]) if seen else torch.zeros(0, len(routing.confidence))
    return {
        **routing_metrics(
            routing.confidence,
            routing.margin,
            routing.experts,
            own_LNk=routing.own,
            rollout_LNk=rollout_experts(trajectories, routing) if recorded else None,
            num_experts=about.num_experts,
            low_L=record.low_L,
            reduce=ranks.sum,
        ),
        **rollout_confidence(seen_BL, torch.tensor([length for _, length in seen]), ranks.sum),
    }


def rollout_experts(trajectories: Sequence[Trajectory], routing: Routing) -> Tensor:
    """Return what the rollout activated where the scored tokens were decided: [L, N, k], as the trainer's `routing`."""
    if not trajectories:
        return routing.own
    decided = [
        t.routed_experts[len(t.prompt_ids) - 1 :][t.action_mask] for t in trajectories if t.routed_experts is not None
    ]
    return torch.cat(decided).transpose(0, 1)


def _updates(name: str, updates: Sequence[Update | None]) -> dict[str, float]:
    """Means over the step's updates that were applied."""
    applied = [update for update in updates if update is not None and update.applied]
    metrics = {
        f"{name}/updates": float(len(applied)),
        f"{name}/skipped": float(sum(update is not None and not update.applied for update in updates)),
    }
    if applied:
        metrics[f"{name}/loss"] = sum(update.loss for update in applied) / len(applied)
        metrics[f"{name}/grad_norm"] = sum(update.grad_norm for update in applied) / len(applied)
        metrics[f"{name}/lr"] = applied[-1].lr
    return metrics
