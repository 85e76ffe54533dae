"""A run: its parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mispo.algorithm.method import Method
from mispo.evaluation import Evaluator
from mispo.metrics.attribution import Attributor
from mispo.metrics.record import LowConfidence
from mispo.metrics.step import About
from mispo.monitor.journal import Clock, Journal
from mispo.system.interrupt import Interrupt
from mispo.system.schedule import Schedule
from mispo.trainer.checkpoint.states import Checkpoints
from mispo.trainer.learner import Learner
from mispo.trainer.ranks import Ranks
from rollouts.sampler import Sampler


@dataclass(frozen=True)
class Run:
    """All parts of a run on this rank. attributor: None where nothing is sampled."""

    schedule: Schedule
    sampler: Sampler
    learner: Learner
    method: Method
    evaluator: Evaluator
    journal: Journal
    checkpoints: Checkpoints
    low_confidence: LowConfidence
    about: About
    attributor: Attributor | None
    clock: Clock
    interrupt: Interrupt

    @property
    def ranks(self) -> Ranks:
        return self.learner.ranks

    @property
    def directory(self) -> Path:
        return self.journal.directory.root

    @property
    def last_checkpoint(self) -> Path | None:
        return self.checkpoints.last

    @property
    def step(self) -> int:
        """The last step that was finished."""
        return self.journal.step

    def close(self, exit_code: int) -> None:
        """End the child processes and the tracker."""
        self.sampler.close()
        self.journal.close(exit_code)
        if exit_code == 0:
            self.ranks.leave()
