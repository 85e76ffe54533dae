"""The learner: actor, critic and reference of a run, and their work in a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from mispo.algorithm.filter import Proposal
from mispo.algorithm.method import Method, Outcome, Targets, ValueTargets
from mispo.metrics.routing import expert_load
from mispo.trainer.balance import share_out
from mispo.trainer.batch import Batch, Packing, pack
from mispo.trainer.engine import TrainEngine, Update
from mispo.trainer.policy import ActorModule, CriticModule, Reference
from mispo.trainer.publish import Publisher
from mispo.trainer.ranks import Ranks
from mispo.trainer.scoring import Scores, Values, score_logprobs, score_policy, score_values
from mispo.trainer.update import UpdateSettings, actor_updates, propose, update_critic, value_updates
from model.moe.balance import update_bias
from rollouts.sampler import Weights
from rollouts.trajectory import Trajectory


@dataclass(frozen=True)
class Updates:
    """The updates of a step. None in actor: a mini-batch in which nothing was accepted."""

    actor: list[Update | None]
    critic: list[Update]

    @staticmethod
    def of(actor: list[Update | None], critic: list[Update]) -> Updates:
        """Join both, with the critic's side of joint updates."""
        return Updates(actor, critic + value_updates(actor))


@dataclass(frozen=True)
class Learner:
    """Scores batches and updates the models; all methods are collective.

    critic: None if a method has no critic, or a value head on the actor's trunk. reference: None without a KL term.
    publisher: None where nothing is sampled. replays_old: whether updates activate the experts of π_old
    (router.replay=old). critic_only_steps: first steps in which the actor stays as it is. bias_rate:
    router.bias_update_rate, 0 = off; num_experts: of a MoE layer.
    """

    ranks: Ranks
    actor: TrainEngine[ActorModule]
    critic: TrainEngine[CriticModule] | None
    reference: Reference | None
    publisher: Publisher | None
    packing: Packing
    settings: UpdateSettings
    replays_old: bool
    critic_only_steps: int
    bias_rate: float
    num_experts: int

    def pack(self, trajectories: list[Trajectory], step: int) -> tuple[Batch, dict[str, float]]:
        """Balance the ranks' work by moving whole prompts, then lay this rank's trajectories out; with metrics."""
        prompts, each = self.packing.prompts_per_step, self.packing.samples_per_prompt
        mine, positions_B, metrics = share_out(self.ranks, trajectories, prompts, each, self.actor.flops.of)
        version = self.actor.updates
        return pack(mine, positions_B, self.packing, step=step, version=version, ranks=self.ranks), metrics

    def score(self, batch: Batch) -> tuple[Batch, Scores]:
        """Compute π_old, V and log π_ref, all before any update of this step.

        Returns the batch for the updates, in which routing may be that of π_old (router.replay=old).
        """
        layout, temperature = self.settings.layout, self.settings.temperature
        policy, values = score_policy(self.actor, batch, layout, temperature, keep_experts=self.replays_old)
        if self.critic:
            values = score_values(self.critic, batch, layout)
        reference_N = score_logprobs(self.reference, batch, layout, temperature) if self.reference else None
        if self.replays_old:
            batch = replace(batch, experts=policy.experts)
        return batch, Scores(policy, values, reference_N)

    def evidence(self, batch: Batch, scores: Scores) -> tuple[Proposal, Outcome]:
        """Return what `Method.targets` takes."""
        outcome = self._outcome(batch, scores.values, scores.reference_N)
        return propose(batch, scores.policy.logprobs_N, self.settings.seed), outcome

    def _outcome(self, batch: Batch, values: Values | None, reference_N: Tensor | None) -> Outcome:
        return Outcome(
            rewards_B=batch.rewards_B,
            penalties_B=batch.penalties_B,
            truncated_B=batch.truncated_B,
            included_B=batch.included_B,
            values_N=values.values_N if values else None,
            bootstrap_B=values.bootstrap_B if values else None,
            reference_N=reference_N,
            reduce=self.ranks.sum,
        )

    def pretrain(self, batch: Batch, method: Method) -> list[Update]:
        """Update the critic on the Monte-Carlo returns of the initial policy."""
        assert self.critic is not None, "only a separate critic can learn without moving the actor"
        values = score_values(self.critic, batch, self.settings.layout)
        return self.update_critic(batch, method.pretraining(batch.offsets_B1, self._outcome(batch, values, None)))

    def update_critic(self, batch: Batch, targets: ValueTargets | None) -> list[Update]:
        """Update the critic, where it is a separate model."""
        if self.critic is None or targets is None:
            return []
        return update_critic(self.critic, batch, targets, self.settings)

    def update_actor(self, batch: Batch, scores: Scores, targets: Targets, method: Method) -> list[Update | None]:
        """Update the actor on the selected samples, each once, and the selection bias of its experts."""
        updates: list[Update | None] = []
        if batch.step > self.critic_only_steps:
            for update in actor_updates(self.actor, batch, targets, method, self.settings):
                updates.append(update)
                if self.publisher and update is not None and update.applied:
                    self.publisher.record()
        if self.bias_rate and scores.policy.routing:
            load_LE = expert_load(scores.policy.routing.own, self.num_experts, self.ranks.sum)
            update_bias(self.actor.module.policy, load_LE, self.bias_rate)
        return updates

    def due_weights(self) -> Weights | None:
        """Return the weights that the sampler has to publish; None where nothing is sampled."""
        return self.publisher.due() if self.publisher else None

    def state(self) -> dict[str, int]:
        """Return the counters that `restore` takes; trainer/checkpoint saves the tensors."""
        return {"actor_updates": self.actor.updates, "critic_updates": self.critic.updates if self.critic else 0}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue after so many updates."""
        self.actor.updates = state["actor_updates"]
        if self.critic:
            self.critic.updates = state["critic_updates"]
