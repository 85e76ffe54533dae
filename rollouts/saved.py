"""Steps on trajectories that another run has saved, without a rollout engine: `mispo train --rollouts FILE …`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rollouts.records import load_positions, load_rollouts
from rollouts.sampler import Clock, Peers, Taken, Weights
from rollouts.trajectory import Trajectory


@dataclass
class SavedSampler:
    """`Sampler` that hands out the trajectories of files, one file per step.

    prompts, samples: of each file, see `saved_sizes`. vocabulary: tokens that the model knows.
    """

    files: Sequence[Path]
    prompts: int
    samples: int
    vocabulary: int
    peers: Peers
    clock: Clock
    newest: int = field(init=False)
    """The newest weight version of the first file: the weights that this run begins with stand for it."""

    def __post_init__(self) -> None:
        self.newest = max(trajectory.weight_version for trajectory in load_step(self.files[0]))

    def take(self, step: int) -> Taken:
        """Return this rank's share of a step's file, with versions as this run counts them; no metrics.

        ValueError for rollouts of a model with more tokens.
        """
        path = self.files[step - 1]
        with self.clock("rollout"):
            trajectories = load_step(path)
        highest = max(int(max(t.prompt_ids.max(), t.completion_ids.max())) for t in trajectories)
        if highest >= self.vocabulary:
            raise ValueError(
                f"--rollouts: {path} has the token {highest}, but the model knows only {self.vocabulary}; these are "
                "rollouts of another model"
            )
        share = self.peers.share(self.prompts)
        mine = trajectories[share.start * self.samples : share.stop * self.samples]
        return Taken([shifted(trajectory, -self.newest) for trajectory in mine], {})

    def publish(self, weights: Weights | None) -> dict[str, float]:
        """Do nothing: no engine samples with the weights."""
        return {}

    def close(self) -> None:
        """Do nothing: no process works for it."""


def saved_sizes(files: Sequence[Path]) -> tuple[int, int]:
    """Return (prompts, samples per prompt) of every file. ValueError if they differ or do not read."""
    sizes = {path: _size(path, load_step(path)) for path in files}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{path} has {prompts} × {samples}" for path, (prompts, samples) in sizes.items())
        raise ValueError(f"--rollouts: the files differ in prompts × samples: {listed}; train on them one by one")
    return sizes[files[0]]


def load_step(path: Path) -> list[Trajectory]:
    """Load all trajectories of a step: of step_N.parquet, or of the files of several ranks, step_N.rank*.parquet."""
    parts = [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"), key=_rank)
    if not parts:
        raise ValueError(f"--rollouts: no such file {str(path)!r}; give RUN/rollouts/step_N.parquet")
    if len(parts) == 1:
        return load_rollouts(parts[0])
    # Ranks have moved prompts among themselves.
    numbered = [pair for part in parts for pair in zip(load_positions(part), load_rollouts(part), strict=True)]
    return [trajectory for _, trajectory in sorted(numbered, key=lambda pair: pair[0])]


def shifted(trajectory: Trajectory, versions: int) -> Trajectory:
    """Return the trajectory with other weight versions."""
    turns = tuple(replace(turn, weight_version=turn.weight_version + versions) for turn in trajectory.turns)
    return replace(trajectory, weight_version=trajectory.weight_version + versions, turns=turns)


def _rank(path: Path) -> int:
    return int(path.stem.rpartition(".rank")[2])


def _size(path: Path, trajectories: Sequence[Trajectory]) -> tuple[int, int]:
    counts = Counter(trajectory.prompt.index for trajectory in trajectories)
    sizes = set(counts.values())
    if len(sizes) != 1:
        raise ValueError(f"--rollouts: {path} does not hold equally many samples of each prompt; was it cut?")
    return len(counts), sizes.pop()
