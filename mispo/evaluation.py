"""Accuracy on evaluation sets: greedy and sampled, and what there is to compare it with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from mispo.data.prompts import Data, make_prompt
from mispo.data.sources import SourceSettings, evaluation_problems
from mispo.trainer.ranks import Ranks
from rewards.pool import RewardPool
from rollouts.engine import Engine
from rollouts.environment import Environment
from rollouts.episodes import Sampling, play_all
from rollouts.grading import grade
from rollouts.trajectory import Prompt, Trajectory

EVAL_SEED = 2**31
"""Evaluation draws from random numbers that training does not use, the same before and after RL."""


class SetSettings(SourceSettings, Protocol):
    """One entry of `eval.sets`: a source. size: its first problems, None = all. samples: None = `eval.samples`."""

    @property
    def size(self) -> int | None: ...
    @property
    def samples(self) -> int | None: ...


@dataclass(frozen=True)
class EvalSet:
    """Problems that are measured together. name: in metrics. samples: k of avg@k, 0 = greedy only."""

    name: str
    prompts: Sequence[Prompt]
    samples: int


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    metrics: over all ranks. samples: greedy traces of this rank's share of the first set, as rows for the report.
    notes: sentences about the reference values among the metrics.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class References:
    """Constants to compare an evaluation with, as metrics reference/…, and sentences for people about them."""

    metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Measure = Callable[["Evaluator"], References]
"""Finds reference values at the start of a run, on every rank alike."""


def build_sets(
    data: Data,
    settings: Mapping[str, SetSettings],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seed: int,
    max_prompt_tokens: int,
) -> list[EvalSet]:
    """Make the held-out problems of the training data the first set, and open those of `eval.sets`.

    Sets without problems are left out. ValueError that names the setting of a set that does not open.
    """
    sets = [EvalSet(data.name, data.heldout, samples)]
    index = -1 - len(data.heldout)
    for name, each in settings.items():
        if name == data.name:
            raise ValueError(
                f"eval.sets.{name}: the held-out problems of the training data have this name; take another"
            )
        problems = evaluation_problems(each, each.size, seed=seed, section=f"eval.sets.{name}")
        prompts = [make_prompt(index - n, problem, tokenizer, max_prompt_tokens) for n, problem in enumerate(problems)]
        index -= len(prompts)
        sets.append(EvalSet(name, prompts, samples if each.samples is None else each.samples))
    return [each for each in sets if each.prompts]


@dataclass
class Evaluator:
    """Samples the evaluation sets with the current weights of `engine`; every rank takes its share.

    engine: None where there is nothing to evaluate, and then there are no sets. max_new_tokens, temperature: of a
    completion, the latter for avg@k. traces: samples that the report shows. references: what the baseline is compared
    with. score: greedy accuracy on the first set, when it was last measured, in `step`; None before.
    """

    engine: Engine | None
    environment: Environment
    pool: RewardPool
    tokenizer: PreTrainedTokenizerBase
    ranks: Ranks
    sets: Sequence[EvalSet]
    max_new_tokens: int
    temperature: float
    traces: int
    references: Sequence[Measure] = ()
    score: float | None = None
    step: int = 0

    def run(self, step: int) -> Evaluation:
        """Measure all sets; rewards are accuracies where they are 0 or 1. Collective.

        eval/<set>/greedy, eval/<set>/avg@<k>: mean reward of the greedy completion, and of k sampled ones.
        eval/response_length: mean tokens on the first set, of the sampled completions if there are any.
        """
        self.step, self.score = step, None
        metrics: dict[str, float] = {}
        traces: list[Trajectory] = []
        for each in self.sets:
            measured = greedy = self._sample(each.prompts, 1, 0.0)
            metrics[f"eval/{each.name}/greedy"] = self._reward(greedy)
            if each.samples:
                measured = self._sample(each.prompts, each.samples, self.temperature)
                metrics[f"eval/{each.name}/avg@{each.samples}"] = self._reward(measured)
            if each is self.sets[0]:
                metrics["eval/response_length"] = self._mean([float(len(t)) for t in measured])
                self.score, traces = metrics[f"eval/{each.name}/greedy"], greedy
        return Evaluation(metrics, sample_rows(traces, self.traces))

    def baseline(self) -> Evaluation:
        """Measure all sets before step 1, and what they are compared with. Collective."""
        found = self.run(0)
        references = [measure(self) for measure in self.references]
        metrics = dict(found.metrics)
        for each in references:
            metrics |= each.metrics
        return Evaluation(metrics, found.samples, [note for each in references for note in each.notes])

    def forced(self, prompts: Sequence[Prompt], opening: Callable[[Prompt], str]) -> float:
        """Return the mean greedy reward if each completion has to begin with the text that `opening` gives. Collective.

        max_new_tokens counts what follows that text.
        """
        return self._reward(self._sample(prompts, 1, 0.0, opening))

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes: the last score and its step."""
        return {"step": self.step, "score": self.score}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with the score of a checkpoint."""
        self.step, self.score = state["step"], state["score"]

    def _sample(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        temperature: float,
        opening: Callable[[Prompt], str] | None = None,
    ) -> list[Trajectory]:
        """This rank's share of the prompts, sampled and graded."""
        mine = [prompts[i] for i in self.ranks.share(len(prompts))]
        openings = ["" if opening is None else opening(prompt) for prompt in mine]
        opened = [self._opened(prompt, text) for prompt, text in zip(mine, openings, strict=True)]
        traces = self._complete(opened, samples, temperature)
        starts = [text for text in openings for _ in range(samples)]
        whole = [replace(t, completion=text + t.completion) for t, text in zip(traces, starts, strict=True)]
        return grade(whole, self.pool)

    def _opened(self, prompt: Prompt, opening: str) -> Prompt:
        """The prompt, with the beginning of its completion."""
        if not opening:
            return prompt
        ids = torch.tensor(self.tokenizer(opening, add_special_tokens=False).input_ids)
        return replace(prompt, ids=torch.cat([prompt.ids, ids]))

    def _complete(self, prompts: Sequence[Prompt], samples: int, temperature: float) -> list[Trajectory]:
        """All samples of the first prompt, then of the second, …; not graded."""
        assert self.engine is not None, "evaluation sets need an engine"
        sampling = Sampling(samples, self.max_new_tokens, temperature, EVAL_SEED)
        return play_all(self.engine, self.environment, self.tokenizer, prompts, sampling)

    def _reward(self, traces: Sequence[Trajectory]) -> float:
        return self._mean([trace.reward for trace in traces])

    def _mean(self, values: Sequence[float]) -> float:
        total, count = self.ranks.sum(torch.tensor([sum(values), len(values)], dtype=torch.float64)).tolist()
        return total / count


def constant_guess(evaluator: Evaluator) -> References:
    """Find the share of the first set's problems with the most frequent answer: what always giving it would reach."""
    if not evaluator.sets:
        return References()
    prompts = evaluator.sets[0].prompts
    share = Counter(prompt.answer for prompt in prompts).most_common(1)[0][1] / len(prompts)
    note = f"Always giving the most frequent answer would be right in {share:.0%} of the cases."
    return References({"reference/constant_guess": share}, [note])


def sample_rows(traces: Sequence[Trajectory], count: int) -> list[dict[str, object]]:
    """Return the first traces as rows for the report."""
    return [
        {"question": t.prompt.text, "answer": t.prompt.answer, "completion": t.completion, "reward": t.reward}
        for t in traces[:count]
    ]
