"""The samples of a step: prompts, trajectories, rewards; with dynamic sampling in several rounds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from rollouts.sampler import grade
from rollouts.trajectory import Trajectory

Phases = Callable[[str], AbstractContextManager[None]]


def collect(run, step: int, timer: Phases) -> tuple[list[Trajectory], dict[str, float]]:
    """This rank's share of the step's prompts, each sampled samples_per_prompt times and graded; and metrics.

    Under algorithm.dynamic_sampling prompts whose samples all got the same reward are replaced by further ones, for at
    most max_rounds rounds; what is missing then is filled up with them, and counted in rollout/filled.

    An interrupt ends it early, with whatever there is.
    """
    assert run.worker is not None, "a replay samples nothing"
    rollout, dynamic, ranks = run.config.rollout, run.config.algorithm.dynamic_sampling, run.ranks
    wanted, each = rollout.prompts_per_step, rollout.samples_per_prompt
    kept: list[list[Trajectory]] = []
    spare: list[list[Trajectory]] = []
    missing, rounds, asked = wanted, 0, False
    while missing and not asked and rounds < (run.config.algorithm.max_rounds if dynamic else 1):
        prompts = run.data.stream.take(missing)
        trajectories: list[Trajectory] = []
        with run.interrupt.breakable():
            with timer("rollout"):
                trajectories = run.worker.sample([prompts[i] for i in ranks.share(missing)])
            with timer("reward"):
                trajectories = grade(trajectories, run.pool)
        groups = [trajectories[start : start + each] for start in range(0, len(trajectories), each)]
        # Which prompts are replaced is decided together: their number on each rank differs.
        for group in ranks.concatenate(groups) if dynamic else groups:
            (spare if dynamic and not informative(group) else kept).append(group)
        rounds += 1
        missing, asked = max(0, wanted - len(kept)), ranks.any(run.interrupt.asked)
    if not dynamic:
        return run.permute([trajectory for group in kept for trajectory in group], step), {}
    chosen = [*kept, *spare][:wanted]
    mine = [trajectory for i in ranks.share(len(chosen)) for trajectory in chosen[i]]
    return run.permute(mine, step), {"rollout/rounds": float(rounds), "rollout/filled": missing / wanted}


def informative(group: list[Trajectory]) -> bool:
    """Whether the samples of a prompt have different rewards, so that a group baseline leaves an advantage."""
    return len({trajectory.reward for trajectory in group}) > 1
