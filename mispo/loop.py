"""The training loop: the file to read first.

    prompts → trajectories → rewards → scores → advantages → selection → critic updates → actor updates
    → weights to the rollout engine → metrics

Each arrow is one function; which engine, reward or filter it calls was chosen in assemble.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from mispo.algorithm.advantage import gae, terminal_values, whiten
from mispo.algorithm.filter import Proposal, Selection
from mispo.algorithm.segments import owner_of
from mispo.run import Run
from mispo.step_metrics import step_metrics
from mispo.trainer.batch import Batch, pack
from mispo.trainer.checkpoint import Progress, save_checkpoint
from mispo.trainer.engine import Update
from mispo.trainer.scoring import PolicyScores, Values, score_policy, score_values
from mispo.trainer.update import update_actor, update_critic
from rollouts.trajectory import Trajectory
from rollouts.worker import grade


@dataclass
class Timer:
    """Seconds per phase of one step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[f"timing_s/{phase}"] = time.perf_counter() - start


def train(run: Run) -> None:
    """All steps of a run, from the one after its last checkpoint."""
    if run.start_step == 0:
        run.sync.record()
        run.sync.publish()
        run.report_baseline()
    for step in range(run.start_step + 1, run.config.trainer.steps + 1):
        train_step(run, step)


def train_step(run: Run, step: int) -> None:
    """One step: sample, grade, score, select, update the critic, update the actor, publish."""
    timer = Timer()
    with timer("step"):
        with timer("rollout"):
            trajectories = roll_out(run)
        staleness = max(run.actor.updates - t.weight_version for t in trajectories)
        with timer("reward"):
            trajectories = run.permute(grade(trajectories, run.pool), step)
        with timer("score"):
            batch = pack_step(run, trajectories)
            policy, values = score(run, batch)
        advantages_N, targets_N, included_N = judge(run, batch, values)
        selection = select(run, batch, policy, step)
        with timer("critic"):
            critic_updates = update_values(run, batch, targets_N, included_N, step)
        with timer("actor"):
            actor_updates = update_policy(run, batch, advantages_N, selection, included_N, step)
        with timer("sync"):
            synced = run.sync.publish()
    metrics = step_metrics(
        run.ranks,
        batch,
        trajectories,
        policy,
        values,
        targets_N,
        selection,
        actor_updates,
        critic_updates,
        num_experts=run.num_experts,
    )
    metrics |= synced | {"rollout/staleness": float(staleness)} | timer.seconds
    metrics |= run.throughput(batch, timer.seconds["timing_s/step"])
    run.save_rollouts(step, trajectories, batch, advantages_N, targets_N, values.bootstrap_B, selection)
    run.report_step(step, metrics)
    if run.due(run.config.checkpoint.every, step):
        checkpoint(run, step)


def roll_out(run: Run) -> list[Trajectory]:
    """This rank's share of the step's prompts, each sampled samples_per_prompt times."""
    prompts = run.data.stream.take(run.config.rollout.prompts_per_step)
    return run.worker.sample([prompts[i] for i in run.ranks.share(len(prompts))])


def pack_step(run: Run, trajectories: list[Trajectory]) -> Batch:
    """Flat tensors, numbered through over all ranks."""
    rollout = run.config.rollout
    return pack(
        trajectories,
        truncation=run.config.algorithm.truncation,
        first=run.ranks.share(rollout.prompts_per_step).start * rollout.samples_per_prompt,
        total=rollout.prompts_per_step * rollout.samples_per_prompt,
    )


def score(run: Run, batch: Batch) -> tuple[PolicyScores, Values]:
    """π_old and V, both before any update of this step."""
    budget = run.config.trainer.tokens_per_microbatch
    policy = score_policy(run.actor, batch, budget, run.config.rollout.temperature)
    return policy, score_values(run.critic, batch, budget)


def judge(run: Run, batch: Batch, values: Values) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages [N], critic targets [N], and which tokens take part at all [N] bool."""
    algorithm = run.config.algorithm
    terminal_B = terminal_values(
        batch.rewards_B,
        values.bootstrap_B,
        batch.truncated_B,
        algorithm.truncation,
        (run.pool.low, run.pool.high),
    )
    bootstrapped_B = batch.truncated_B & (algorithm.truncation == "bootstrap")
    advantages_N, targets_N = gae(
        values.values_N, terminal_B, bootstrapped_B, batch.offsets_B1, algorithm.gamma, algorithm.lam
    )
    included_N = batch.included_B[owner_of(batch.offsets_B1)]
    if algorithm.whiten == "batch":
        advantages_N = whiten(advantages_N, included_N, run.ranks.sum)
    return advantages_N, targets_N, included_N


def select(run: Run, batch: Batch, policy: PolicyScores, step: int) -> Selection:
    """What the filter keeps, decided once for all updates of the step."""
    proposal = Proposal(
        old_logprobs_N=policy.logprobs_N,
        rollout_logprobs_N=batch.rollout_logprobs_N,
        offsets_B1=batch.offsets_B1,
        position_B=batch.position_B,
        group_B=batch.position_B // run.config.rollout.samples_per_prompt,
        seed=run.step_seed("filter", step),
        everyone=lambda x_B: run.ranks.gather(x_B, batch.position_B, batch.total),
    )
    return run.filter(proposal)


def update_values(run: Run, batch: Batch, targets_N: Tensor, included_N: Tensor, step: int) -> list[Update]:
    """The critic learns from every generated token, whatever the filter thinks of it."""
    if not run.config.critic.train_on_truncated:
        included_N = included_N & ~batch.truncated_B[owner_of(batch.offsets_B1)]
    return update_critic(
        run.critic,
        batch,
        targets_N,
        included_N,
        parts=run.config.trainer.critic_minibatches,
        token_budget=run.config.trainer.tokens_per_microbatch,
        seed=run.step_seed("critic", step),
    )


def update_policy(
    run: Run, batch: Batch, advantages_N: Tensor, selection: Selection, included_N: Tensor, step: int
) -> list[Update | None]:
    """The actor learns from what the filter selected, each sample once."""
    if step <= run.config.critic.warmup_steps:
        return []
    return update_actor(
        run.actor,
        batch,
        advantages_N,
        selection.weights(batch.offsets_B1) * included_N,
        included_N,
        parts=run.config.trainer.actor_minibatches,
        token_budget=run.config.trainer.tokens_per_microbatch,
        seed=run.step_seed("actor", step),
        temperature=run.config.rollout.temperature,
        loss_norm=run.config.algorithm.loss_norm,
        after_update=run.sync.record,
    )


def checkpoint(run: Run, step: int) -> None:
    """Everything that a resumed run needs."""
    run.last_checkpoint = save_checkpoint(
        run.directory / "checkpoints",
        progress=Progress(
            step=step,
            cursor=run.data.stream.cursor,
            actor_updates=run.actor.updates,
            critic_updates=run.critic.updates,
            wandb_id=run.wandb_id,
            filter_state=run.filter.state(),
        ),
        actor=run.actor,
        critic=run.critic,
        tokenizer=run.tokenizer,
        sync=run.sync,
        keep_last=run.config.checkpoint.keep_last,
    )
