"""Where a step's mismatch comes from, by computing its log-probs on the way from the rollout to the trainer.

    rollout, as sampled → the same weights in one forward without a cache (rest: the engine)
        → in the trainer's precision (precision) → the trainer's weights (weights: staleness)

and once more with the rollout's routing replayed everywhere: what then vanishes was mediated by routing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mispo.algorithm.variance_shares import Attribution, attribute
from mispo.build.models import another
from mispo.metrics.diagnosis import Standing, standing_of
from mispo.metrics.routing import mean_agreement
from mispo.metrics.step import StepRecord, rollout_experts
from mispo.monitor.report.attribution import write_attribution
from mispo.run import Run
from mispo.trainer.batch import Batch
from mispo.trainer.policy import ActorModule, Reference
from mispo.trainer.publish import WeightSync
from mispo.trainer.scoring import score_logprobs
from rollouts.trajectory import Trajectory


def attribute_step(run: Run, step: int, record: StepRecord) -> dict[str, float]:
    """Attribute this step's mismatch and say where the model stands; writes RUN/attribution/step_N.*, returns metrics.

    Before the step's updates, while the engine still has the weights that sampled. Collective. The first one of a run
    says its conclusion on the screen.
    """
    attribution, standing = measure(run, record)
    if run.ranks.first:
        write_attribution(run.directory, step, attribution, standing)
    run.say_standing(standing)
    return metrics_of(attribution)


def measure(run: Run, record: StepRecord) -> tuple[Attribution, Standing]:
    """The attribution of up to router.attribute_trajectories trajectories of all ranks, and the model's standing."""
    limit = min(run.config.router.attribute_trajectories, record.batch.total)
    members = [b for b, position in enumerate(record.batch.position_B.tolist()) if position < limit]
    batch, trajectories = record.batch.part(members), [record.trajectories[b] for b in members]

    def everyone(x_B: Tensor) -> Tensor:
        return run.ranks.gather(x_B, batch.position_B, limit)

    free = telescope(run, batch, trajectories, replay=False)
    recorded = run.config.router.record and run.num_experts > 0
    replayed = telescope(run, batch, trajectories, replay=True) if recorded else None
    replaying = run.config.router.replay == "rollout"
    seen = record.policy.routing and record.policy.routing.at(record.batch.tokens_of(members))
    windows_B2 = record.selection.window_B2
    bounds = torch.tensor(run.config.algorithm.filter.trajectory_bounds, dtype=torch.float64)
    standing = standing_of(
        log_x_N=torch.stack(list(free.values())).sum(0),
        log_x_replayed_N=torch.stack(list(replayed.values())).sum(0) if replayed else None,
        weights_part_N=(replayed if replayed and replaying else free)["weights"],
        confidence_N=seen.confidence.mean(0) if seen else None,
        agreement_N=mean_agreement(seen.own, rollout_experts(trajectories, seen)) if seen and recorded else None,
        chance=seen.experts.shape[-1] / run.num_experts if seen else math.nan,
        offsets_B1=batch.offsets_B1,
        log_window_B2=(bounds if windows_B2 is None else windows_B2[members]).log(),
        replaying=replaying,
        everyone=everyone,
        reduce=run.ranks.sum,
    )
    return attribute(free, replayed, batch.offsets_B1, everyone), standing


def telescope(run: Run, batch: Batch, trajectories: Sequence[Trajectory], *, replay: bool) -> dict[str, Tensor]:
    """Parts of log x [N], in nats; replay: with the rollout's routing in every forward."""
    assert isinstance(run.sync, WeightSync), "without an engine there is nothing to compare with"
    temperature = run.config.rollout.temperature
    experts = [t.routed_experts for t in trajectories] if replay else None
    batch = replace(batch, experts=experts)
    members = range(len(batch))
    trainer_N = score_logprobs(run.actor, batch, members, run.layout, temperature)
    stale_N = trainer_N
    if run.sync.engine.weight_version != run.actor.updates:
        _, weights = run.sync.rollout_weights()
        policy = run.actor.module.policy
        copy = another(policy, weights, run.ranks.device, policy.config._attn_implementation)
        shadow = Reference(ActorModule(copy, run.actor.module.dtype, replays=True), run.ranks)
        stale_N = score_logprobs(shadow, batch, members, run.layout, temperature)
    pairs = [(t.prompt_ids, t.completion_ids) for t in trajectories]
    scores = run.sync.engine.score(pairs, temperature, experts)
    scored = [score[t.action_mask] for score, t in zip(scores, trajectories, strict=True)]
    engine_N = torch.cat(scored) if scored else torch.zeros(0)
    steps_N = [x_N.double() for x_N in (trainer_N, stale_N, engine_N, batch.rollout_logprobs_N)]
    names = ("weights", "precision", "rest")
    return {name: after - before for name, after, before in zip(names, steps_N, steps_N[1:], strict=False)}


def metrics_of(attribution: Attribution) -> dict[str, float]:
    """attribution/<part>: share of Var(log x); attribution/<part>_mediated: through routing; and over all parts."""
    metrics = {"attribution/mediated": attribution.mediated, "attribution/rms": math.sqrt(attribution.variance)}
    for name, part in attribution.parts.items():
        metrics |= {f"attribution/{name}": part.share, f"attribution/{name}_mediated": part.mediated}
    return metrics
