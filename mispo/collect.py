"""The samples of a step: prompts, trajectories, rewards; with dynamic sampling in several rounds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from mispo.run import Run
from rollouts.trajectory import Trajectory
from rollouts.worker import grade

Phases = Callable[[str], AbstractContextManager[None]]


def collect(run: Run, step: int, timer: Phases) -> tuple[list[Trajectory], dict[str, float]]:
    """This rank's share of the step's prompts, each sampled samples_per_prompt times and graded; and metrics.

    Under algorithm.dynamic_sampling prompts whose samples all got the same reward are replaced by further ones, for at
    most max_rounds rounds; what is missing then is filled up with them, and counted in rollout/filled.

    An interrupt ends it early, with whatever there is.
    """
    rollout, algorithm, ranks = run.config.rollout, run.config.algorithm, run.ranks
    assert run.worker is not None, "a replay samples nothing"
    wanted = len(ranks.share(rollout.prompts_per_step))
    kept: list[list[Trajectory]] = []
    spare: list[list[Trajectory]] = []
    missing, rounds, asked = wanted, 0, False
    while missing and not asked and rounds < (algorithm.max_rounds if algorithm.dynamic_sampling else 1):
        prompts = run.data.stream.take(missing * ranks.size if rounds else rollout.prompts_per_step)
        trajectories: list[Trajectory] = []
        with run.interrupt.breakable():
            with timer("rollout"):
                trajectories = run.worker.sample([prompts[i] for i in ranks.share(len(prompts))])
            with timer("reward"):
                trajectories = grade(trajectories, run.pool)
        for start in range(0, len(trajectories), rollout.samples_per_prompt):
            group = trajectories[start : start + rollout.samples_per_prompt]
            (spare if algorithm.dynamic_sampling and not informative(group) else kept).append(group)
        rounds += 1
        missing, asked = ranks.max(torch.tensor([max(0, wanted - len(kept)), int(run.interrupt.asked)])).tolist()
    chosen = [trajectory for group in [*kept, *spare][:wanted] for trajectory in group]
    metrics: dict[str, float] = {}
    if algorithm.dynamic_sampling:
        filled = ranks.count(max(0, wanted - len(kept)))
        metrics = {"rollout/rounds": float(rounds), "rollout/filled": filled / rollout.prompts_per_step}
    return run.permute(chosen, step), metrics


def informative(group: list[Trajectory]) -> bool:
    """Whether the samples of a prompt have different rewards, so that a group baseline leaves an advantage."""
    return len({trajectory.reward for trajectory in group}) > 1
