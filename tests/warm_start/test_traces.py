"""The generated traces: what they look like, and that the verifier takes both habits."""

import pytest

from mispo.data.prompts import build_data
from mispo.warm_start.traces import CAREFUL, careful_opening, careful_writer, count_bits_careful, terse
from model.tokenizer import character_tokenizer
from rewards.gym import gym_reward
from support.data_files import gym


def test_a_careful_trace_halves_and_counts() -> None:
    assert count_bits_careful({"number": 138, "answer": "3"}) == (
        "<think>138:0;69:1;34:1;17:2;8:2;4:2;2:2;1:3</think>3"
    )


@pytest.mark.parametrize("task", CAREFUL)
def test_both_habits_are_right_and_well_formed_for_the_verifier(task: str) -> None:
    reward = gym_reward(task)
    for prompt in build_data(gym(), character_tokenizer()).stream.take(50):
        columns = {name: value for name, value in prompt.row.items() if name != "answer"}
        for write in (careful_writer(task), terse):
            assert reward.score(prompt.text, write(prompt.row), prompt.answer, **columns) == 1.0
        assert careful_writer(task)(prompt.row).startswith(careful_opening(task, prompt.row))
        assert not terse(prompt.row).startswith(careful_opening(task, prompt.row))


def test_a_task_without_traces_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"warm_start\.steps: there are no traces .* did you mean count_bits.*warm_start\.steps=0"
    ):
        careful_writer("count_bit")
