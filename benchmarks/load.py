"""What a measurement of training works on, and what it finds: the same numbers for mispo and TRL. Needs no torch."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import asdict, dataclass

FIRST_TOKEN, LAST_TOKEN = 7, 100
"""Token ids are drawn from here: the letters of the character tokenizer."""


@dataclass(frozen=True)
class Load:
    """A step's trajectories and how they are trained on.

    preset or model: a shape of mispo's with random weights, or a Hugging Face directory. lengths: completion tokens of
    each trajectory, each `samples_per_prompt` in a row belonging to one prompt of `prompt` tokens.
    tokens_per_microbatch: padding included. minibatches: optimizer updates. layouts: measured in turn, in one process.
    rounds: measured steps (of each layout), after one that is not.
    """

    lengths: tuple[int, ...]
    tokens_per_microbatch: int
    preset: str | None = None
    model: str | None = None
    prompt: int = 16
    samples_per_prompt: int = 8
    minibatches: int = 1
    layouts: tuple[str, ...] = ("padded",)
    zero_stage: int = 0
    ranks: int = 1
    dtype: str = "auto"
    attention: str = "sdpa"
    optimizer: str = "adamw"
    checkpointing: bool = False
    rounds: int = 2
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest trajectory, prompt included."""
        return self.prompt + max(self.lengths)

    @property
    def generated(self) -> int:
        """Generated tokens of a step."""
        return sum(self.lengths)

    def dumps(self) -> str:
        return json.dumps(asdict(self))


def loads(text: str) -> Load:
    """What `dumps` wrote."""
    return Load(**{key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(text).items()})


@dataclass(frozen=True)
class Sequence:
    """Token ids of one trajectory, its prompt's number and its reward."""

    prompt_ids: list[int]
    completion_ids: list[int]
    group: int
    reward: float


def sequences(load: Load) -> list[Sequence]:
    """The trajectories: random tokens, random rewards of 0 and 1."""
    draw = random.Random(load.seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(count)]

    found: list[Sequence] = []
    for number, length in enumerate(load.lengths):
        group = number // load.samples_per_prompt
        prompt = tokens(load.prompt) if number % load.samples_per_prompt == 0 else found[-1].prompt_ids
        found.append(Sequence(prompt, tokens(length), group, float(draw.random() < 0.5)))
    return found


def ragged(count: int, limit: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths as reasoning traces have them: log-normal, median limit/4, σ 0.8; about one in 25 is at the limit."""
    draw = random.Random(seed)
    lengths = [min(limit, max(1, round(draw.lognormvariate(0.0, 0.8) * limit / 4))) for _ in range(count)]
    return (*lengths[:-1], limit)


@dataclass(frozen=True)
class Measured:
    """Of one layout. score_s, update_s: seconds of each round. peak_mib: how far the memory rises within a step.
    states_mib: weights, gradients and optimizer, lying there between steps. flops: the model's, in one step of all
    ranks, scoring and update. card_flops: what the accelerators can do per second in bf16, None if unknown.
    logprobs: mean old log-prob of each trajectory of this rank, before any update."""

    score_s: list[float]
    update_s: list[float]
    peak_mib: float
    states_mib: float
    score_flops: float
    update_flops: float
    card_flops: float | None
    parameters: int
    threads: int
    logprobs: list[float]

    @property
    def seconds(self) -> list[float]:
        return [score + update for score, update in zip(self.score_s, self.update_s, strict=True)]

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)
