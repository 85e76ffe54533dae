"""`mispo train --rollouts`: steps on trajectories that another run has saved, without a rollout engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mispo.collect import Phases
from mispo.config.schema import MispoConfig
from rollouts.records import load_positions, load_rollouts
from rollouts.trajectory import Trajectory


def replay_config(config: MispoConfig, files: Sequence[Path]) -> MispoConfig:
    """One step per file, as many prompts and samples as the files hold. ValueError if they differ or do not read."""
    if config.critic.pretrain_steps:
        raise ValueError("critic.pretrain_steps: a replay samples nothing to pre-train on; set it to 0")
    sizes = {path: _size(path, load_step(path)) for path in files}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{path} has {prompts} × {samples}" for path, (prompts, samples) in sizes.items())
        raise ValueError(f"--rollouts: the files differ in prompts × samples: {told}; replay them one by one")
    prompts, samples = sizes[files[0]]
    rollout = replace(config.rollout, prompts_per_step=prompts, samples_per_prompt=samples)
    return replace(config, rollout=rollout, trainer=replace(config.trainer, steps=len(files)))


def replayed(files: Sequence[Path], vocabulary: int) -> Callable[..., tuple[list[Trajectory], dict]]:
    """What stands in for `collect`: this rank's share of a step's file, and no metrics.

    vocabulary: tokens that the model knows. ValueError for rollouts of a model with more.
    """
    newest = max(trajectory.weight_version for trajectory in load_step(files[0]))

    def collect(run, step: int, timer: Phases) -> tuple[list[Trajectory], dict[str, float]]:
        with timer("rollout"):
            trajectories = load_step(files[step - 1])
        highest = max(int(max(t.prompt_ids.max(), t.completion_ids.max())) for t in trajectories)
        if highest >= vocabulary:
            raise ValueError(
                f"--rollouts: {files[step - 1]} has the token {highest}, but the model knows only {vocabulary}; these "
                "are rollouts of another model"
            )
        share = run.ranks.share(run.config.rollout.prompts_per_step)
        each = run.config.rollout.samples_per_prompt
        mine = trajectories[share.start * each : share.stop * each]
        # The versions of this run begin at 0, with the weights that the newest of the first file stand for.
        return [replace(t, weight_version=t.weight_version - newest) for t in mine], {}

    return collect


def load_step(path: Path) -> list[Trajectory]:
    """All trajectories of a step: of step_N.parquet, or of the files that several ranks wrote, step_N.rank*.parquet."""
    parts = [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"), key=_rank)
    if not parts:
        raise ValueError(f"--rollouts: no such file {str(path)!r}; give RUN/rollouts/step_N.parquet")
    if len(parts) == 1:
        return load_rollouts(parts[0])
    # Ranks have moved prompts among themselves.
    numbered = [pair for part in parts for pair in zip(load_positions(part), load_rollouts(part), strict=True)]
    return [trajectory for _, trajectory in sorted(numbered, key=lambda pair: pair[0])]


def _rank(path: Path) -> int:
    return int(path.stem.rpartition(".rank")[2])


def _size(path: Path, trajectories: Sequence[Trajectory]) -> tuple[int, int]:
    """(prompts, samples per prompt)."""
    counts = Counter(trajectory.prompt.index for trajectory in trajectories)
    sizes = set(counts.values())
    if len(sizes) != 1:
        raise ValueError(f"--rollouts: {path} does not hold equally many samples of each prompt; was it cut?")
    return len(counts), sizes.pop()
