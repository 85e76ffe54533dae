"""reasoning-gym's verifiers, made hard to game."""

from __future__ import annotations

from difflib import get_close_matches

from rewards.base import Reward, split_trace
from rewards.exact import score_exact

# reasoning-gym takes a second to import: only the functions that need it do so.


def gym_reward(task: str | None) -> Reward:
    """Apply the scorer of a reasoning-gym generator to the text after the thinking.

    Generators that define their own scorer are asked; the library's default gives partial credit for merely
    containing the answer, so for the others the answer has to match exactly. ValueError for an unknown task, or None.
    """
    from reasoning_gym import create_dataset
    from reasoning_gym.factory import ProceduralDataset

    if task is None:
        raise ValueError("reward.parts: gym scores reasoning-gym tasks; set data.task, or use exact")
    generator = create_dataset(check_task(task), size=1, seed=0)
    if type(generator).score_answer is ProceduralDataset.score_answer:
        return Reward(score_exact)

    def score(prompt: str, completion: str, answer: str, **row: object) -> float:
        entry = {"question": prompt, "answer": answer, **row}
        return float(generator.score_answer(answer=split_trace(completion).answer, entry=entry))

    return Reward(score)


def check_task(task: str, key: str = "data.task") -> str:
    """Return the name if reasoning-gym has such a generator; else ValueError with the key and the nearest name."""
    import reasoning_gym  # noqa: F401  (importing the package registers its generators)
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = get_close_matches(task, DATASETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{key}: reasoning-gym has no generator {task!r}{hint}")
    return task
