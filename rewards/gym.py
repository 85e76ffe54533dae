"""reasoning-gym's verifiers, made hard to game."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from reasoning_gym import create_dataset  # importing the package registers its generators
from reasoning_gym.factory import DATASETS, ProceduralDataset

from rewards.base import Reward, score_exact, split_trace


def gym_reward(task: str) -> Reward:
    """The scorer of a reasoning-gym generator, applied to the text after the thinking.

    A generator with a scorer of its own is asked; the library's default gives partial credit for merely
    containing the answer, so for the others the answer has to match exactly. ValueError for an unknown task.
    """
    generator = create_dataset(check_task(task), size=1, seed=0)
    if type(generator).score_answer is ProceduralDataset.score_answer:
        return Reward(score_exact)

    def score(prompt: str, completion: str, answer: str, **row: Any) -> float:
        entry = {"question": prompt, "answer": answer, **row}
        return float(generator.score_answer(answer=split_trace(completion).answer, entry=entry))

    return Reward(score)


def check_task(task: str) -> str:
    """The name, if reasoning-gym has such a generator; else ValueError with the nearest one."""
    if task not in DATASETS:
        near = get_close_matches(task, DATASETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"data.task: reasoning-gym has no generator {task!r}{hint}")
    return task
