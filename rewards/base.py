"""The form of a reward, and how a completion is read: thinking, then the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict

THINK, END_THINK = "<think>", "</think>"

ScoreFunction = Callable[..., "float | tuple[float, dict[str, object]]"]
"""`score(prompt, completion, answer, **row)`: all texts, row = the data row's other columns."""


@dataclass(frozen=True)
class Reward:
    """Scores completions, each with a value in the range low ≤ value ≤ high."""

    score: ScoreFunction
    low: float = 0.0
    high: float = 1.0


class Item(TypedDict):
    """What is scored: the question and the completion as texts, the reference answer, the data row."""

    prompt: str
    completion: str
    answer: str
    row: Mapping[str, object]


@dataclass(frozen=True)
class Trace:
    """A completion taken apart. `well_formed`: one think block at the very start, closed, then an answer."""

    thinking: str
    answer: str
    well_formed: bool


def split_trace(completion: str) -> Trace:
    """Split at the last closing think tag, after which the answer stands; a trace that never closes has no answer."""
    head, closed, tail = completion.rpartition(END_THINK)
    opened = completion.startswith(THINK)
    if not closed:
        return Trace(completion.removeprefix(THINK), "" if opened else completion.strip(), False)
    answer = tail.strip()
    one_block = opened and completion.count(THINK) == 1 and completion.count(END_THINK) == 1
    return Trace(head.removeprefix(THINK), answer, one_block and bool(answer))
