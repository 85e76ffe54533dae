"""Held-out accuracy: greedy and sampled, and what there is to compare it with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mispo.trainer.ranks import Ranks
from mispo.warm_start.traces import CAREFUL, careful_opening
from rewards.workers import RewardPool
from rollouts.engine import Engine
from rollouts.sampler import RolloutWorker, grade
from rollouts.trajectory import Prompt, Trajectory

EVAL_SEED = 2**31
"""Evaluation samples with random numbers of its own, the same before and after RL."""


@dataclass(frozen=True)
class Evaluation:
    """metrics: over all ranks. samples: this rank's greedy traces, as rows for the report."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


@dataclass
class Evaluator:
    """Samples the held-out prompts with the current weights of `engine`; every rank takes its share.

    engine: None where there is nothing to evaluate. task: name in the metrics. samples: k of avg@k, 0 = greedy only.
    """

    engine: Engine | None
    pool: RewardPool
    tokenizer: PreTrainedTokenizerBase
    heldout: list[Prompt]
    ranks: Ranks
    task: str
    samples: int
    max_new_tokens: int
    temperature: float
    traces: int
    toy: str | None
    permuted: bool
    score: float | None = None
    step: int = 0

    def run(self, step: int) -> Evaluation:
        metrics, greedy = self._measure()
        self.step, self.score = step, metrics.get(f"eval/{self.task}/greedy")
        return Evaluation(metrics, sample_rows(greedy, self.traces))

    def baseline(self) -> tuple[dict[str, float], list[dict[str, Any]], list[str]]:
        metrics, traces = self._measure()
        references = self.references(self.toy)
        return {**metrics, **references}, sample_rows(traces, self.traces), self._notes(references)

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "score": self.score}

    def restore(self, state: Any) -> None:
        self.step, self.score = state["step"], state["score"]

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
        if self.permuted:
            notes.append("Control experiment: the rewards were shuffled within each step.")
        return notes

    def _measure(self) -> tuple[dict[str, float], list[Trajectory]]:
        """Metrics over all ranks (rewards; accuracy where the reward is 0 or 1), and this rank's greedy traces."""
        if not self.heldout:
            return {}, []
        greedy = self._sample(self._share(), 1, 0.0)
        metrics = {f"eval/{self.task}/greedy": self._mean([t.reward for t in greedy])}
        if self.samples:
            sampled = self._sample(self._share(), self.samples, self.temperature)
            metrics[f"eval/{self.task}/avg@{self.samples}"] = self._mean([t.reward for t in sampled])
            metrics["eval/response_length"] = self._mean([float(len(t)) for t in sampled])
        else:
            metrics["eval/response_length"] = self._mean([float(len(t)) for t in greedy])
        return metrics, greedy

    def references(self, task: str | None) -> dict[str, float]:
        """Constants beside the curve: the best constant answer, and the accuracy if careful thinking is forced."""
        if not self.heldout:
            return {}
        answers = Counter(prompt.answer for prompt in self.heldout)
        found = {"reference/constant_guess": answers.most_common(1)[0][1] / len(self.heldout)}
        if task in CAREFUL:
            openings = [careful_opening(task, prompt.row) for prompt in self._share()]
            forced = self._sample(self._share(), 1, 0.0, openings)
            found["reference/forced_careful"] = self._mean([t.reward for t in forced])
        return found

    def _share(self) -> list[Prompt]:
        return [self.heldout[i] for i in self.ranks.share(len(self.heldout))]

    def _sample(
        self, prompts: list[Prompt], samples: int, temperature: float, openings: Sequence[str] | None = None
    ) -> list[Trajectory]:
        assert self.engine is not None, "held-out problems need an engine"
        worker = RolloutWorker(
            self.engine,
            self.tokenizer,
            samples_per_prompt=samples,
            max_new_tokens=self.max_new_tokens,
            temperature=temperature,
            seed=EVAL_SEED,
        )
        if openings is None:
            return grade(worker.sample(prompts), self.pool)
        ids = [self.tokenizer(text, add_special_tokens=False).input_ids for text in openings]
        opened = [replace(p, ids=torch.cat([p.ids, torch.tensor(i)])) for p, i in zip(prompts, ids, strict=True)]
        traces = worker.sample(opened)
        whole = [replace(t, completion=o + t.completion) for t, o in zip(traces, openings, strict=True)]
        return grade(whole, self.pool)

    def _mean(self, values: list[float]) -> float:
        total, count = self.ranks.sum(torch.tensor([sum(values), len(values)], dtype=torch.float64)).tolist()
        return total / count


def sample_rows(traces: Sequence[Trajectory], count: int) -> list[dict[str, Any]]:
    """The first traces as rows for the report."""
    return [
        {"question": t.prompt.text, "answer": t.prompt.answer, "completion": t.completion, "reward": t.reward}
        for t in traces[:count]
    ]
