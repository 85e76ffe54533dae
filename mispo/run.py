"""A run: its parts, and what happens around a step: reporting, evaluating, saving."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mispo.algorithm.objective import Samples
from mispo.algorithm.segments import segment_mean
from mispo.build.algorithm import Method
from mispo.config.schema import MispoConfig
from mispo.data.prompts import Data
from mispo.evaluation import Evaluator, sample_rows
from mispo.metrics.diagnosis import Standing
from mispo.metrics.routing import low_thresholds
from mispo.metrics.step import StepRecord
from mispo.monitor.advice import paragraph
from mispo.monitor.alarms import Alarms
from mispo.monitor.console import StepPrinter, eval_line
from mispo.monitor.tracking import Tracker
from mispo.monitor.watchdog import Watchdog
from mispo.system.files import replacing
from mispo.system.interrupt import Interrupt
from mispo.trainer.batch import Batch, Layout
from mispo.trainer.checkpoint.states import Progress, save_checkpoint
from mispo.trainer.engine import TrainEngine, Update
from mispo.trainer.policy import Reference
from mispo.trainer.publish import NoSync, WeightSync
from mispo.trainer.ranks import Ranks, max_memory_gb
from model.facts import peak_flops
from model.moe.routers import Routing
from rewards.shaping import overlong_penalty
from rewards.workers import RewardPool
from rollouts.records import save_rollouts, save_samples
from rollouts.sampler import RolloutWorker, request_seed
from rollouts.trajectory import Trajectory

RANDOM_CHOICES = ("actor", "critic", "filter")
"""What a step decides by chance, apart from sampling."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """OSError names the path, whatever the libraries below have to say; their own sentences are left as they are."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"cannot write {path}: {error}; mend that, then continue") from error


@dataclass
class Run:
    """All parts of a run on this rank.

    tracker, printer: on the first rank only. critic, reference: where the method has them. worker: where trajectories
    are sampled and not replayed. collect(run, step, timer): this rank's graded trajectories of a step, and metrics.
    score: greedy accuracy on the held-out problems, if this step has measured it. low_L: confidence of each MoE layer
    below which a token counts as unsure, from the first step.
    """

    config: MispoConfig
    directory: Path
    start_step: int
    ranks: Ranks
    tokenizer: PreTrainedTokenizerBase
    data: Data
    actor: TrainEngine
    critic: TrainEngine | None
    layout: Layout
    reference: Reference | None
    num_experts: int
    pool: RewardPool
    collect: Callable[[Run, int, Any], tuple[list[Trajectory], dict[str, float]]]
    worker: RolloutWorker | None
    sync: WeightSync | NoSync
    method: Method
    alarms: Alarms
    watchdog: Watchdog
    evaluator: Evaluator
    tracker: Tracker | None
    printer: StepPrinter | None
    interrupt: Interrupt = field(default_factory=Interrupt)
    resumed: bool = False
    last_checkpoint: Path | None = None
    step: int = 0
    score: float | None = None
    low_L: Tensor | None = None
    told_standing: bool = False

    @property
    def wandb_id(self) -> str | None:
        return self.tracker.wandb_id if self.tracker else None

    @property
    def reward_range(self) -> tuple[float, float]:
        """Lowest and highest reward that the verifier declares."""
        return self.pool.low, self.pool.high

    def overlong_penalty(self, length: int) -> float:
        """What a completion of so many tokens loses (algorithm.overlong)."""
        limit, overlong = self.config.rollout.max_new_tokens, self.config.algorithm.overlong
        return overlong_penalty(length, limit, round(overlong.share * limit), overlong.penalty)

    def step_seed(self, name: str, step: int) -> int:
        """Seed of one random choice of one step."""
        return request_seed(self.config.seed, step, RANDOM_CHOICES.index(name))

    def permute(self, trajectories: list[Trajectory], step: int) -> list[Trajectory]:
        """The control experiment of `reward.permute`; else the trajectories as they are."""
        if not self.config.reward.permute:
            return trajectories
        rewards = [t.reward for t in trajectories]
        random.Random(self.config.seed * 1_000_003 + step).shuffle(rewards)
        return [replace(t, reward=reward) for t, reward in zip(trajectories, rewards, strict=True)]

    def due(self, every: int, step: int) -> bool:
        """Whether something of every so many steps (0 = only the last one) is due."""
        return step == self.config.trainer.steps or (every > 0 and step % every == 0)

    def attributes(self, step: int) -> bool:
        """Whether this step's mismatch is attributed: the first one's of a run, then every router.attribute_every."""
        every = self.config.router.attribute_every
        return self.worker is not None and (step == 1 or (every > 0 and self.due(every, step)))

    def fit_thresholds(self, routing: Routing | None) -> None:
        """What counts as low routing confidence in this run, once: see `low_thresholds`."""
        if routing is not None and self.low_L is None:
            self.low_L = low_thresholds(routing.confidence, self.ranks.sum)

    def say_standing(self, standing: Standing) -> None:
        """Advice on routing, where it is first known."""
        if self.printer and not self.told_standing:
            told, stale = paragraph(standing), self.config.rollout.staleness
            if stale and not standing.stale:
                told += (
                    f" So far the weights are current; those of later steps lag by rollout.staleness={stale}: "
                    "router.attribute_every measures what that changes."
                )
            self.printer.console.print(f"routing: {told}", markup=False, highlight=False)
        self.told_standing = True

    def report_baseline(self) -> None:
        """Row 0: the state before RL, with reference values, traces and notes."""
        metrics, traces = self.evaluator.run()
        references = self.evaluator.references(self.config.data.task)
        row = {**metrics, **references}
        if "eval/response_length" in row:
            row["response_length/mean"] = row["eval/response_length"]
        if self.ranks.first:
            save_samples(self.directory / "samples_before.jsonl", sample_rows(traces, self.config.eval.traces))
            with replacing(self.directory / "notes.json") as temporary:
                temporary.write_text(json.dumps(self._notes(references)))
        self._log(0, row)
        if metrics and self.printer:
            self.printer.console.print(eval_line(0, self.config.trainer.steps, metrics))

    def report_step(self, step: int, metrics: dict[str, float]) -> None:
        """The step's line and row, with an evaluation where one is due."""
        self.step, self.score = step, None
        if self.printer:
            self.printer.step(step, metrics)
        if self.due(self.config.eval.every, step):
            start = time.perf_counter()
            measured, traces = self.evaluator.run()
            self.score = measured.get(f"eval/{self.evaluator.task}/greedy")
            metrics |= measured | {"timing_s/eval": time.perf_counter() - start}
            if self.ranks.first:
                with writing(self.directory / "samples_after.jsonl"):
                    save_samples(self.directory / "samples_after.jsonl", sample_rows(traces, self.config.eval.traces))
            if measured and self.printer:
                self.printer.eval(step, measured)
        self._log(step, metrics)

    def check_alarms(self, metrics: dict[str, float]) -> str | None:
        """Say what looks wrong; the reason to stop, if alarms.action wants that. The same on every rank."""
        due = self.alarms.check(metrics)
        for alarm in due:
            if self.printer:
                self.printer.console.print(f"alarm: {alarm.text}", style="bold yellow", markup=False, highlight=False)
        return due[0].text if due and self.config.alarms.action == "stop" else None

    def report_pretraining(self, number: int, updates: Sequence[Update]) -> None:
        """One line for each rollout of the critic's pre-training."""
        if self.printer:
            loss = sum(update.loss for update in updates) / max(len(updates), 1)
            text = f"critic pre-training {number}/{self.config.critic.pretrain_steps}  loss {loss:.4f}"
            self.printer.console.print(text, highlight=False)

    def save_rollouts(self, step: int, record: StepRecord, samples: Samples) -> None:
        """rollouts/step_N.parquet, with a suffix per rank where there are several.

        Per trajectory also: mean advantage, log ρ̄ and the filter's multiplicity; with a critic mean target and V(s_T).
        """
        every = self.config.tracking.rollouts_every
        if not every or step % every:
            return
        suffix = "" if self.ranks.size == 1 else f".rank{self.ranks.rank}"
        offsets_B1 = record.batch.offsets_B1
        columns = {
            "position": record.batch.position_B.tolist(),
            "advantage_mean": segment_mean(samples.advantages, offsets_B1).tolist(),
            "log_rho": record.selection.log_rho_B.tolist(),
            "multiplicity": record.selection.multiplicity_B.tolist(),
        }
        if record.values is not None and record.targets_N is not None:
            columns["target_mean"] = segment_mean(record.targets_N, offsets_B1).tolist()
            columns["bootstrap"] = record.values.bootstrap_B.tolist()
        path = self.directory / "rollouts" / f"step_{step}{suffix}.parquet"
        with writing(path):
            save_rollouts(path, record.trajectories, columns)

    def throughput(self, batch: Batch, seconds: dict[str, float]) -> dict[str, float]:
        """Generated tokens of all ranks per second of the whole step, the memory high-water mark, and what the trainer
        computes: model FLOPs per second and rank while it scores and learns, and their share of the card's peak."""
        tokens = self.ranks.count(int(batch.offsets_B1[-1]))
        flops = self.ranks.sum(torch.tensor(sum(e.flops.take() for e in (self.actor, self.critic) if e))).item()
        busy = sum(seconds.get(f"timing_s/{phase}", 0.0) for phase in ("score", "critic", "actor"))
        each = flops / busy / self.ranks.size
        metrics = {
            "perf/tokens_per_s": tokens / seconds["timing_s/step"],
            "perf/max_memory_gb": max_memory_gb(self.ranks.device),
            "perf/tflops": each / 1e12,
        }
        if self.peak_flops:
            metrics["perf/mfu"] = each / self.peak_flops
        return metrics

    @cached_property
    def peak_flops(self) -> float | None:
        """Of this rank's device in bf16; None for one that is not known, as a CPU."""
        device = self.ranks.device
        return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    def checkpoint(self, step: int) -> None:
        """Everything that a resumed run needs."""
        with writing(self.directory / "checkpoints" / f"step_{step}"):
            self.last_checkpoint = save_checkpoint(
                self.directory / "checkpoints",
                progress=Progress(
                    step=step,
                    cursor=self.data.stream.cursor,
                    actor_updates=self.actor.updates,
                    critic_updates=self.critic.updates if self.critic else 0,
                    wandb_id=self.wandb_id,
                    filter_state=self.method.filter.state(),
                    alarms_seen=self.alarms.seen,
                    score=self.score,
                    low_confidence=None if self.low_L is None else self.low_L.tolist(),
                ),
                actor=self.actor,
                critic=self.critic,
                tokenizer=self.tokenizer,
                sync=self.sync,
                keep_last=self.config.checkpoint.keep_last,
                keep_best=self.config.checkpoint.keep_best,
            )

    def stop_if_asked(self, step: int, cursor: int | None = None) -> None:
        """KeyboardInterrupt on every rank, after a checkpoint of `step`, if a signal has come to any of them.

        cursor: the place in the prompts at the end of that step, where the next one has taken some since.
        """
        if not self.ranks.any(self.interrupt.asked):
            return
        if cursor is not None:
            self.data.stream.cursor = cursor
        if self.last_checkpoint is None or self.last_checkpoint.name != f"step_{step}":
            self.checkpoint(step)
        raise KeyboardInterrupt

    def close(self, exit_code: int) -> None:
        """End the children and the tracker."""
        self.pool.close()
        if self.tracker:
            self.tracker.close(exit_code)
        if exit_code == 0:
            self.ranks.leave()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if self.tracker:
            with writing(self.directory / "metrics.jsonl"):
                self.tracker.log(step, metrics)

    def _notes(self, references: dict[str, float]) -> list[str]:
        notes = []
        if "reference/constant_guess" in references:
            guess = references["reference/constant_guess"]
            notes.append(f"Always giving the most frequent answer would be right in {guess:.0%} of the cases.")
        if "reference/forced_careful" in references:
            forced = references["reference/forced_careful"]
            notes.append(
                f"Before RL, forcing the first character of a careful trace already gives {forced:.0%}: what RL "
                "teaches here is mostly to think before answering, not how to think."
            )
        if self.config.reward.permute:
            notes.append("Control experiment: the rewards were shuffled within each step.")
        return notes
