"""The training loop: the file to read first.

    prompts → trajectories → rewards → scores → advantages → selection → critic updates → actor updates
    → weights to the rollout engine → metrics

Each arrow is one function; which engine, reward or filter it calls was chosen in assemble.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from mispo.algorithm.advantage import gae, group_advantages, monte_carlo, terminal_values, whiten
from mispo.algorithm.filter import Proposal, Selection
from mispo.algorithm.objective import Samples
from mispo.algorithm.segments import owner_of
from mispo.algorithm.variance_shares import Attribution
from mispo.metrics.attribution import attribute_step, measure
from mispo.metrics.diagnosis import Standing
from mispo.metrics.routing import expert_load
from mispo.metrics.step import StepRecord, step_metrics
from mispo.monitor.watchdog import Watchdog
from mispo.run import Run
from mispo.trainer.balance import share_out
from mispo.trainer.batch import Batch, pack
from mispo.trainer.engine import Update
from mispo.trainer.scoring import PolicyScores, Values, score_logprobs, score_policy, score_values
from mispo.trainer.update import ValueLoss, update_actor, update_critic, value_updates
from model.moe.balance import update_bias
from rollouts.trajectory import Trajectory


@dataclass
class Timer:
    """Seconds per phase of one step; a phase may come several times."""

    watchdog: Watchdog
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        with self.watchdog.watch(phase):
            yield
        key = f"timing_s/{phase}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start


def train(run: Run) -> None:
    """All steps of a run, from the one after its last checkpoint."""
    if not run.resumed:
        run.sync.record()
        run.sync.publish()
        run.report_baseline()
        pretrain_critic(run)
    run.interrupt.arm(talks=run.ranks.first, launched=run.ranks.size > 1)
    for step in range(run.start_step + 1, run.config.trainer.steps + 1):
        train_step(run, step)


def train_step(run: Run, step: int) -> None:
    """One step: sample, grade, score, select, update the critic, update the actor, publish."""
    timer, cursor = Timer(run.watchdog), run.data.stream.cursor
    with timer("step"):
        trajectories, collected = run.collect(run, step, timer)
        run.stop_if_asked(step - 1, cursor)
        with timer("score"):
            batch, trajectories, shared = pack_step(run, trajectories)
            batch, policy, values, reference_N = score(run, batch)
        run.fit_thresholds(policy.routing)
        run.stop_if_asked(step - 1, cursor)
        advantages_N, targets_N, included_N = judge(run, batch, values)
        selection = select(run, batch, policy.logprobs_N, step)
        samples = Samples(
            old_logprobs=policy.logprobs_N,
            advantages=advantages_N,
            weights=weigh(run, batch, selection, policy.logprobs_N, included_N),
            included=included_N,
            reference=reference_N,
        )
        lags_B = lags(run, trajectories)
        record = StepRecord(batch, trajectories, policy, values, targets_N, selection, lags_B, run.low_L)
        # Before the updates: should they fail, the batch is there to be replayed.
        run.save_rollouts(step, record, samples)
        attributed = {}
        if run.attributes(step):
            with timer("attribute"):
                attributed = attribute_step(run, step, record)
        value_loss = learn_values(run, batch, values, targets_N, included_N)
        with timer("critic"):
            critic_updates = update_values(run, batch, value_loss, step)
        with timer("actor"):
            actor_updates = update_policy(run, batch, samples, value_loss, step)
        critic_updates += value_updates(actor_updates)
        balance(run, policy)
        with timer("sync"):
            synced = run.sync.publish()
    metrics = step_metrics(
        run.ranks,
        record,
        actor_updates,
        critic_updates,
        num_experts=run.num_experts,
        reward_range=run.reward_range,
    )
    metrics |= collected | shared | attributed | synced | timer.seconds
    metrics |= run.throughput(batch, timer.seconds)
    run.report_step(step, metrics)
    stop = run.check_alarms(metrics)
    if stop or run.due(run.config.checkpoint.every, step):
        run.checkpoint(step)
    if stop:
        raise RuntimeError(f"alarms.action=stop: {stop}")
    run.stop_if_asked(step)


def attribute_next(run: Run) -> tuple[int, Attribution, Standing]:
    """Where the mismatch of the step after the last checkpoint comes from; it is sampled and scored, no more."""
    step = run.start_step + 1
    batch, trajectories, _ = pack_step(run, run.collect(run, step, Timer(run.watchdog))[0])
    batch, policy, values, _ = score(run, batch)
    selection = select(run, batch, policy.logprobs_N, step)
    record = StepRecord(batch, trajectories, policy, values, None, selection, lags(run, trajectories), run.low_L)
    return step, *measure(run, record)


def lags(run: Run, trajectories: list[Trajectory]) -> Tensor:
    """Actor updates that the weights of each trajectory are behind, [B]."""
    return torch.tensor([run.actor.updates - t.weight_version for t in trajectories])


def pack_step(run: Run, trajectories: list[Trajectory]) -> tuple[Batch, list[Trajectory], dict[str, float]]:
    """Equal work for all ranks, then flat tensors; with this rank's trajectories from now on, and metrics."""
    prompts, each = run.config.rollout.prompts_per_step, run.config.rollout.samples_per_prompt
    mine, positions_B, metrics = share_out(run.ranks, trajectories, prompts, each, run.actor.flops.of)
    batch = pack(
        mine,
        truncation=run.config.algorithm.truncation,
        positions_B=positions_B,
        total=prompts * each,
        penalty=run.overlong_penalty,
        replay=run.config.router.replay == "rollout",
    )
    return batch, mine, metrics


def score(run: Run, batch: Batch) -> tuple[Batch, PolicyScores, Values | None, Tensor | None]:
    """π_old, V where there is a critic, log π_ref where there is a reference; all before any update of this step.

    With the batch for the updates, in which routing may be that of π_old (router.replay: old).
    """
    temperature, old = run.config.rollout.temperature, run.config.router.replay == "old"
    policy, values = score_policy(run.actor, batch, run.layout, temperature, keep_experts=old)
    if run.critic:
        values = score_values(run.critic, batch, run.layout)
    reference_N = None
    if run.reference:
        reference_N = score_logprobs(run.reference, batch, range(len(batch)), run.layout, temperature)
    return replace(batch, experts=policy.experts) if old else batch, policy, values, reference_N


def judge(run: Run, batch: Batch, values: Values | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Advantages [N], critic targets [N] if there is a critic, and which tokens take part at all [N] bool."""
    algorithm = run.config.algorithm
    owner_N = owner_of(batch.offsets_B1)
    included_N = batch.included_B[owner_N]
    bootstrap_B = values.bootstrap_B if values else torch.zeros(len(batch))
    terminal_B = batch.penalties_B + terminal_values(
        batch.rewards_B, bootstrap_B, batch.truncated_B, algorithm.truncation, run.reward_range
    )
    targets_N = None
    if values is None:
        advantages_N = group_advantages(terminal_B, batch.included_B, groups(run, batch), algorithm.advantage)[owner_N]
    else:
        bootstrapped_B = batch.truncated_B & (algorithm.truncation == "bootstrap")
        arguments = (values.values_N, terminal_B, bootstrapped_B, batch.offsets_B1, algorithm.gamma)
        advantages_N, targets_N = gae(*arguments, algorithm.lam)
        if run.config.critic.lam != algorithm.lam:
            _, targets_N = gae(*arguments, run.config.critic.lam)
    if algorithm.whiten == "batch":
        advantages_N = whiten(advantages_N, included_N, run.ranks.sum)
    return advantages_N, targets_N, included_N


def groups(run: Run, batch: Batch) -> Tensor:
    """Number of each trajectory's prompt within the step, [B]."""
    return batch.position_B // run.config.rollout.samples_per_prompt


def select(run: Run, batch: Batch, logprobs_N: Tensor, step: int) -> Selection:
    """What filter and correction keep, by the log-probs of the target policy: π_old, once for all updates of a step."""
    proposal = Proposal(
        old_logprobs_N=logprobs_N,
        rollout_logprobs_N=batch.rollout_logprobs_N,
        offsets_B1=batch.offsets_B1,
        position_B=batch.position_B,
        group_B=groups(run, batch),
        seed=run.step_seed("filter", step),
        everyone=lambda x_B: run.ranks.gather(x_B, batch.position_B, batch.total),
    )
    selection = run.method.filter(proposal)
    return replace(selection, keep_N=selection.keep_N & (run.method.correct(proposal.log_x_N) > 0))


def weigh(run: Run, batch: Batch, selection: Selection, old_logprobs_N: Tensor, included_N: Tensor) -> Tensor:
    """Weight of each token in the policy loss, [N]: its multiplicity or 0, times the correction for the mismatch."""
    selected_N = selection.weights(batch.offsets_B1) * included_N
    correction_N = run.method.correct(old_logprobs_N.double() - batch.rollout_logprobs_N.double()).to(selected_N)
    # Where the filter rejects, a correction may be infinite.
    return selected_N * torch.where(selected_N > 0, correction_N, 0.0)


def learn_values(
    run: Run, batch: Batch, values: Values | None, targets_N: Tensor | None, included_N: Tensor
) -> ValueLoss | None:
    """The critic's loss: every generated token counts, whatever the filter thinks of it."""
    if values is None or targets_N is None:
        return None
    settings = run.config.critic
    if not settings.train_on_truncated:
        included_N = included_N & ~batch.truncated_B[owner_of(batch.offsets_B1)]
    return ValueLoss(values.values_N, targets_N, included_N, settings.value_clip, settings.loss_weight)


def update_values(run: Run, batch: Batch, value_loss: ValueLoss | None, step: int) -> list[Update]:
    """The critic learns, where it is a model of its own."""
    if run.critic is None or value_loss is None:
        return []
    return update_critic(
        run.critic,
        batch,
        value_loss,
        parts=run.config.trainer.critic_minibatches,
        layout=run.layout,
        seed=run.step_seed("critic", step),
    )


def pretrain_critic(run: Run) -> None:
    """The critic learns the Monte-Carlo returns of the initial policy; truncated trajectories have none."""
    for number in range(run.config.critic.pretrain_steps):
        # Steps before the first one, so that they share no seed with any.
        step = number - run.config.critic.pretrain_steps
        batch, *_ = pack_step(run, run.collect(run, step, Timer(run.watchdog))[0])
        values = score_values(run.critic, batch, run.layout)
        targets_N = monte_carlo(batch.rewards_B, batch.offsets_B1, run.config.algorithm.gamma)
        finished_N = (batch.included_B & ~batch.truncated_B)[owner_of(batch.offsets_B1)]
        updates = update_values(run, batch, learn_values(run, batch, values, targets_N, finished_N), step)
        run.report_pretraining(number + 1, updates)


def update_policy(
    run: Run, batch: Batch, samples: Samples, value_loss: ValueLoss | None, step: int
) -> list[Update | None]:
    """The actor learns from what the filter selected, each sample once; and values with it if they share its trunk."""
    if step <= run.config.critic.warmup_steps:
        return []
    return update_actor(
        run.actor,
        batch,
        samples,
        run.method.objective,
        parts=run.config.trainer.actor_minibatches,
        layout=run.layout,
        seed=run.step_seed("actor", step),
        temperature=run.config.rollout.temperature,
        after_update=run.sync.record,
        reweigh=partial(reweigh, run, batch, samples, step) if run.config.algorithm.mask_policy == "current" else None,
        value_loss=None if run.critic else value_loss,
        mtp_weight=run.config.trainer.mtp_weight,
    )


def balance(run: Run, policy: PolicyScores) -> None:
    """Even out the load of the experts for the next step (router.bias_update_rate), by that of this step."""
    rate = run.config.router.bias_update_rate
    if rate and policy.routing:
        load_LE = expert_load(policy.routing.own, run.num_experts, run.ranks.sum)
        update_bias(run.actor.module.policy, load_LE, rate)


def reweigh(run: Run, batch: Batch, samples: Samples, step: int, members: list[int]) -> Tensor:
    """Weights of these trajectories' tokens with the filter looking at the current π_θ (mask_policy: current)."""
    part, at = batch.part(members), batch.tokens_of(members)
    logprobs_N = score_logprobs(run.actor, part, range(len(part)), run.layout, run.config.rollout.temperature)
    selection = select(run, part, logprobs_N, step)
    return weigh(run, part, selection, samples.old_logprobs[at], samples.included[at])
