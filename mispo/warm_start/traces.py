"""Traces for the warm start: for each task, what a careful and a terse solver write.

They stand in for pre-training, so that RL starts from a model that has both habits and has to learn which of them
earns more reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from mispo.evaluation import Evaluator, Measure, References
from rollouts.trajectory import Prompt

Row = dict[str, Any]


def count_bits_careful(row: Row) -> str:
    """Halve the number again and again and keep count: `<think>138:0;69:1;34:1;17:2;8:2;4:2;2:2;1:3</think>3`."""
    number, count, steps = int(row["number"]), 0, []
    while number:
        count += number & 1
        steps.append(f"{number}:{count}")
        number >>= 1
    return f"<think>{';'.join(steps)}</think>{row['answer']}"


def terse(row: Row) -> str:
    """Give the answer at once, with an empty think block."""
    return f"<think></think>{row['answer']}"


CAREFUL: dict[str, Callable[[Row], str]] = {"count_bits": count_bits_careful}
"""Task → its careful trace."""


def careful_opening(task: str, row: Row) -> str:
    """Return the first characters of a careful trace, enough to force the habit: the tag and one character."""
    trace = CAREFUL[task](row)
    return trace[: len("<think>") + 1]


def careful_writer(task: str | None) -> Callable[[Row], str]:
    """Return the writer of a task's careful traces; ValueError for a task without one, with the nearest that has."""
    if task not in CAREFUL:
        near = get_close_matches(str(task), CAREFUL, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"warm_start.steps: there are no traces for data.task {task!r}{hint} "
            f"(only for {', '.join(CAREFUL)}); set warm_start.steps=0 and start from model.path"
        )
    return CAREFUL[task]


def careful_reference(task: str | None, heldout: Sequence[Prompt]) -> Measure:
    """Return a measure of the accuracy that forced careful thinking reaches on held-out problems of a task.

    Its result is empty for a task without traces, without problems, and without an engine.
    """

    def measure(evaluator: Evaluator) -> References:
        if task not in CAREFUL or not heldout or evaluator.engine is None:
            return References()
        forced = evaluator.forced(heldout, lambda prompt: careful_opening(task, prompt.row))
        note = (
            f"Before RL, forcing the first character of a careful trace already gives {forced:.0%}: what RL teaches "
            "here is mostly to think before answering, not how to think."
        )
        return References({"reference/forced_careful": forced}, [note])

    return measure
