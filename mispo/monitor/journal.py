"""Everything that a run writes or shows: rollouts, rows of metrics, samples, lines on the screen, alarms."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from mispo.algorithm.method import Targets
from mispo.algorithm.segments import segment_mean
from mispo.algorithm.variance_shares import Attribution
from mispo.metrics.diagnosis import Diagnosis
from mispo.monitor.advice import paragraph
from mispo.monitor.alarms import Alarms
from mispo.monitor.console import StepPrinter, eval_line
from mispo.monitor.report.attribution import write_attribution
from mispo.monitor.tracking import Tracker
from mispo.system.files import replacing, writing
from mispo.system.rundir import RunDir
from mispo.trainer.batch import Batch
from mispo.trainer.engine import Update
from mispo.trainer.scoring import Scores
from rollouts.records import save_rollouts, save_samples

Samples = Sequence[Mapping[str, Any]]
"""Traces for the report, see `save_samples`."""


@dataclass(frozen=True)
class JournalSettings:
    """What the journal needs to know of the config.

    steps, pretrain_steps: how many there are. rollouts_every: tracking.rollouts_every. lag: rollout.lag.
    """

    steps: int
    pretrain_steps: int
    rollouts_every: int
    lag: int


class Journal:
    """Writes and shows on the first rank; rollouts on every rank.

    tracker, printer: on the first rank only. alarms: the same on every rank, since one may stop the run.
    """

    def __init__(
        self,
        directory: RunDir,
        settings: JournalSettings,
        *,
        tracker: Tracker | None,
        printer: StepPrinter | None,
        alarms: Alarms,
    ) -> None:
        self.directory = directory
        self.settings = settings
        self.tracker = tracker
        self.printer = printer
        self.alarms = alarms
        self.step = 0
        self._advised = False

    def say(self, text: str, *, style: str | None = None) -> None:
        """Print a line for people, once for all ranks."""
        if self.printer:
            self.printer.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def keep(self, batch: Batch, scores: Scores, targets: Targets) -> None:
        """Write rollouts/step_N.parquet, with a suffix per rank where there are several.

        Per trajectory also: mean advantage, log ρ̄ and the filter's multiplicity; with a critic mean target and V(s_T).
        """
        every = self.settings.rollouts_every
        if not every or batch.step % every:
            return
        columns = {
            "position": batch.position_B.tolist(),
            "advantage_mean": segment_mean(targets.samples.advantages, batch.offsets_B1).tolist(),
            "log_rho": targets.selection.log_rho_B.tolist(),
            "multiplicity": targets.selection.multiplicity_B.tolist(),
        }
        if scores.values is not None and targets.values is not None:
            columns["target_mean"] = segment_mean(targets.values.targets, batch.offsets_B1).tolist()
            columns["bootstrap"] = scores.values.bootstrap_B.tolist()
        path = self.directory.rollouts(batch.step, batch.ranks.rank, batch.ranks.size)
        with writing(path):
            save_rollouts(path, batch.trajectories, columns)

    def baseline(self, metrics: Mapping[str, float], samples: Samples, notes: Sequence[str]) -> None:
        """Write row 0: the state before RL, with reference values, traces and notes."""
        row = dict(metrics)
        if "eval/response_length" in row:
            row["response_length/mean"] = row["eval/response_length"]
        if self.tracker:
            save_samples(self.directory.samples_before, samples)
            with replacing(self.directory.notes) as temporary:
                temporary.write_text(json.dumps(list(notes)))
        self._log(0, row)
        if self.printer and any(key.startswith("eval/") for key in metrics):
            self.printer.console.print(eval_line(0, self.settings.steps, metrics))

    def line(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print a step's line."""
        self.step = step
        if self.printer:
            self.printer.step(step, metrics)

    def evaluation(self, step: int, metrics: Mapping[str, float], samples: Samples) -> None:
        """Print an evaluation's line and keep its traces."""
        if self.tracker:
            with writing(self.directory.samples_after):
                save_samples(self.directory.samples_after, samples)
        if metrics and self.printer:
            self.printer.eval(step, metrics)

    def row(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Write a step's row and show alarms; returns the reason to stop, if alarms.action wants that."""
        self._log(step, metrics)
        due = self.alarms.check(metrics)
        for alarm in due:
            self.say(f"alarm: {alarm.text}", style="bold yellow")
        return due[0].text if due and self.alarms.stops else None

    def pretraining(self, number: int, updates: Sequence[Update]) -> None:
        """Print one line for a rollout of the critic's pre-training."""
        loss = sum(update.loss for update in updates) / max(len(updates), 1)
        self.say(f"critic pre-training {number}/{self.settings.pretrain_steps}  loss {loss:.4f}")

    def attribution(self, step: int, attribution: Attribution, diagnosis: Diagnosis) -> None:
        """Write RUN/attribution/step_N.*; of the first one in a run the advice is printed."""
        if self.tracker:
            write_attribution(self.directory.root, step, attribution, diagnosis)
        if not self._advised:
            advice = paragraph(diagnosis)
            if self.settings.lag and not diagnosis.stale:
                advice += (
                    f" So far the weights are current; those of later steps lag by rollout.lag={self.settings.lag}: "
                    "router.attribute_every measures what that changes."
                )
            self.say(f"routing: {advice}")
        self._advised = True

    def state(self) -> Mapping[str, Any]:
        """Return what `restore` takes, and the id by which a resumed run finds its W&B run."""
        return {"alarms": self.alarms.state(), "wandb_id": self.tracker.wandb_id if self.tracker else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue counting alarms; the tracker has its id already."""
        self.alarms.restore(state["alarms"])

    def close(self, exit_code: int) -> None:
        """End the tracker."""
        if self.tracker:
            self.tracker.close(exit_code)

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.tracker:
            with writing(self.directory.metrics):
                self.tracker.log(step, metrics)


class Clock:
    """Sums up the seconds of each phase of a step. watch: `Watchdog.watch`, which each phase runs inside."""

    def __init__(self, watch: Callable[[str], AbstractContextManager[None]]) -> None:
        self._watch = watch
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        with self._watch(phase):
            yield
        key = f"timing_s/{phase}"
        self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return timing_s/<phase> since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds
