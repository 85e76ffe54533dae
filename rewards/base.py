"""The form of a reward, and how a completion is read: thinking, then the answer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

THINK, END_THINK = "<think>", "</think>"

ScoreFunction = Callable[..., "float | tuple[float, dict[str, Any]]"]
"""`score(prompt, completion, answer, **row)`: all texts, row = the data row's other columns."""


@dataclass(frozen=True)
class Reward:
    """A verifier and the range of its values, low ≤ value ≤ high."""

    score: ScoreFunction
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Trace:
    """A completion taken apart. `well_formed`: one think block at the very start, closed, then an answer."""

    thinking: str
    answer: str
    well_formed: bool


def split_trace(completion: str) -> Trace:
    """The answer is the text after the last closing think tag; a trace that never closes has none."""
    head, closed, tail = completion.rpartition(END_THINK)
    opened = completion.startswith(THINK)
    if not closed:
        return Trace(completion.removeprefix(THINK), "" if opened else completion.strip(), False)
    answer = tail.strip()
    one_block = opened and completion.count(THINK) == 1 and completion.count(END_THINK) == 1
    return Trace(head.removeprefix(THINK), answer, one_block and bool(answer))


def score_format(prompt: str, completion: str, answer: str, **row: Any) -> float:
    """1 for a well-formed trace, else 0."""
    return float(split_trace(completion).well_formed)


def score_exact(prompt: str, completion: str, answer: str, **row: Any) -> float:
    """1 if the text after the thinking is the reference answer, else 0."""
    return float(split_trace(completion).answer == answer.strip())


def mix_format(task: Reward, weight: float) -> Reward:
    """(1 − weight)·task + weight·format; the parts go into the info."""

    def score(prompt: str, completion: str, answer: str, **row: Any) -> tuple[float, dict[str, Any]]:
        result = task.score(prompt, completion, answer, **row)
        value, info = result if isinstance(result, tuple) else (result, {})
        shape = score_format(prompt, completion, answer)
        return (1 - weight) * value + weight * shape, {**info, "task": value, "format": shape}

    return Reward(score, (1 - weight) * task.low, (1 - weight) * task.high + weight)


def load_function(name: str) -> Reward:
    """A user's own reward, `package.module:function`; its range from attributes `low` and `high` (0, 1).

    ValueError that names reward.name if it does not import or is no function.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward.name: {name!r} does not import ({error}); give package.module:function, on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(f"reward.name: {name!r} is not a function")
    return Reward(function, getattr(function, "low", 0.0), getattr(function, "high", 1.0))
