"""Finds where a step's mismatch comes from, by computing its log-probs on the way from the rollout to the trainer.

    rollout, as sampled → the same weights in one forward without a cache (rest: the engine)
        → in the trainer's precision (precision) → the trainer's weights (weights: staleness)

and once more with the rollout's routing replayed everywhere: what then vanishes was mediated by routing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mispo.algorithm.variance_shares import Attribution, attribute
from mispo.metrics.diagnosis import Diagnosis, Evidence, diagnose
from mispo.metrics.record import StepRecord
from mispo.metrics.routing import mean_agreement
from mispo.metrics.step import rollout_experts
from mispo.trainer.batch import Batch
from mispo.trainer.learner import Learner
from mispo.trainer.policy import ActorModule, Reference, copy_of
from mispo.trainer.scoring import score_logprobs
from rollouts.engine import Engine


@dataclass(frozen=True)
class Attributor:
    """Measures where the mismatch of a step comes from, before the step's updates; collective.

    engine: with the weights that sampled. trajectories: at most so many are looked at, over all ranks. recorded:
    whether the rollout's experts are known. replaying: whether the run replays them (router.replay=rollout).
    """

    engine: Engine
    learner: Learner
    trajectories: int
    recorded: bool
    replaying: bool

    def measure(self, record: StepRecord) -> tuple[Attribution, Diagnosis]:
        """Return the attribution and the diagnosis."""
        whole, ranks, num_experts = record.batch, self.learner.ranks, self.learner.num_experts
        limit = min(self.trajectories, whole.total)
        members = [b for b, position in enumerate(whole.position_B.tolist()) if position < limit]
        batch = whole.part(members)

        def everyone(x_B: Tensor) -> Tensor:
            return ranks.gather(x_B, batch.position_B, limit)

        recorded = self.recorded and num_experts > 0
        free = self.telescope(batch, replay=False)
        replayed = self.telescope(batch, replay=True) if recorded else None
        routing = record.scores.policy.routing
        seen = routing and routing.at(whole.tokens_of(members))
        windows_B2 = record.targets.selection.window_B2
        evidence = Evidence(
            log_x_N=torch.stack(list(free.values())).sum(0),
            log_x_replayed_N=torch.stack(list(replayed.values())).sum(0) if replayed else None,
            weights_part_N=(replayed if replayed and self.replaying else free)["weights"],
            confidence_N=seen.confidence.mean(0) if seen else None,
            agreement_N=mean_agreement(seen.own, rollout_experts(batch.trajectories, seen))
            if seen and recorded
            else None,
            chance=seen.experts.shape[-1] / num_experts if seen else math.nan,
            offsets_B1=batch.offsets_B1,
            log_window_B2=None if windows_B2 is None else windows_B2[members].log(),
            replaying=self.replaying,
        )
        return attribute(free, replayed, batch.offsets_B1, everyone), diagnose(evidence, everyone, ranks.sum)

    def telescope(self, batch: Batch, *, replay: bool) -> dict[str, Tensor]:
        """Return the parts of log x [N], in nats. replay: with the rollout's routing in every forward."""
        layout, temperature = self.learner.settings.layout, self.learner.settings.temperature
        experts = _experts(batch) if replay else None
        batch = replace(batch, experts=experts)
        trainer_N = score_logprobs(self.learner.actor, batch, layout, temperature)
        stale_N = trainer_N
        if self.engine.weight_version != self.learner.actor.updates:
            stale_N = score_logprobs(self._sampled(), batch, layout, temperature)
        pairs = [(t.prompt_ids, t.completion_ids) for t in batch.trajectories]
        scores = self.engine.score(pairs, temperature, experts)
        scored = [score[t.action_mask] for score, t in zip(scores, batch.trajectories, strict=True)]
        engine_N = torch.cat(scored) if scored else torch.zeros(0)
        steps_N = [x_N.double() for x_N in (trainer_N, stale_N, engine_N, batch.rollout_logprobs_N)]
        names = ("weights", "precision", "rest")
        return {name: after - before for name, after, before in zip(names, steps_N, steps_N[1:], strict=False)}

    def _sampled(self) -> Reference:
        """Return a copy of the policy with the weights that sampled, in the trainer's precision."""
        assert self.learner.publisher is not None, "without an engine there is nothing to compare with"
        _, weights = self.learner.publisher.sampled()
        module, ranks = self.learner.actor.module, self.learner.ranks
        assert isinstance(module, ActorModule)
        policy = module.policy
        copy = copy_of(policy, weights, ranks.device, policy.config._attn_implementation)
        return Reference(ActorModule(copy, module.dtype, replays=True), ranks)


def _experts(batch: Batch) -> list[Tensor]:
    found = [t.routed_experts for t in batch.trajectories if t.routed_experts is not None]
    assert len(found) == len(batch.trajectories), "replay needs the experts of every trajectory"
    return found


def attribution_metrics(attribution: Attribution) -> Mapping[str, float]:
    """Return attribution/<part>: share of Var(log x); attribution/<part>_mediated: through routing; and over all."""
    metrics = {"attribution/mediated": attribution.mediated, "attribution/rms": math.sqrt(attribution.variance)}
    for name, part in attribution.parts.items():
        metrics |= {f"attribution/{name}": part.share, f"attribution/{name}_mediated": part.mediated}
    return metrics
