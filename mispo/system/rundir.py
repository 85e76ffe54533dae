"""Every path of a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """The paths of a run's files. Nothing is created, opened or checked.

    root: the run directory. checkpoints holds step_N/ directories and the link `latest` (trainer/checkpoint). reference
    and base are Hugging Face directories: the policy at the start, for a KL term, and the base model of adapters.
    """

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def error(self) -> Path:
        return self.root / "error.txt"

    @property
    def notes(self) -> Path:
        return self.root / "notes.json"

    @property
    def samples_before(self) -> Path:
        return self.root / "samples_before.jsonl"

    @property
    def samples_after(self) -> Path:
        return self.root / "samples_after.jsonl"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def curve(self) -> Path:
        return self.root / "curve.png"

    @property
    def attribution(self) -> Path:
        return self.root / "attribution"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def reference(self) -> Path:
        return self.root / "reference"

    @property
    def base(self) -> Path:
        return self.root / "base"

    def rollouts(self, step: int, rank: int = 0, ranks: int = 1) -> Path:
        """Return the path of a step's trajectories; with several ranks each rank has a file."""
        suffix = "" if ranks == 1 else f".rank{rank}"
        return self.root / "rollouts" / f"step_{step}{suffix}.parquet"

    def attributed(self, step: int, overrides: Sequence[str] = ()) -> Path:
        """Return the path of an attribution's numbers, beside its picture; overrides: settings unlike the run's."""
        return self.attribution / f"{'+'.join([f'step_{step}', *overrides]).replace('/', '_')}.json"

    def checkpoint(self, step: int) -> Path:
        """Return the path of the checkpoint after a step."""
        return self.checkpoints / f"step_{step}"
