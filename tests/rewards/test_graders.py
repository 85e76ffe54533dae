"""How completions are read and graded, hostile ones included."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.base import split_trace
from rewards.exact import score_exact
from rewards.format import score_format
from rewards.gym import check_task, gym_reward


@pytest.mark.parametrize(
    ("completion", "thinking", "answer", "well_formed"),
    [
        ("<think>a</think>3", "a", "3", True),
        ("<think></think> 3 \n", "", "3", True),
        ("<think>a</think>", "a", "", False),
        ("3", "3", "3", False),
        ("<think>3", "3", "", False),
        ("x<think>a</think>3", "x<think>a", "3", False),
        ("<think>a</think>2</think>3", "a</think>2", "3", False),
        ("<think>a<think>b</think>3", "a<think>b", "3", False),
        ("", "", "", False),
        ("</think>3", "", "3", False),
    ],
)
def test_traces_are_taken_apart(completion: str, thinking: str, answer: str, well_formed: bool) -> None:
    trace = split_trace(completion)
    assert (trace.thinking, trace.answer, trace.well_formed) == (thinking, answer, well_formed)
    assert score_format("", completion, "") == float(well_formed)


def test_exact_reads_only_what_follows_the_thinking() -> None:
    assert score_exact("", "<think>maybe 4</think>3", "3") == 1.0
    assert score_exact("", "<think>3</think>4", "3") == 0.0
    assert score_exact("", "<think>3", "3") == 0.0
    assert score_exact("", "3", " 3 ") == 1.0


HOSTILE = ["0 1 2 3 4 5 6 7 8 9", "3 or 4", "the answer is 3", "3\n3", "03", "+3", "3.0", "٣", "", " ", "{3}", "3,"]


@pytest.mark.parametrize("answer", HOSTILE)
def test_an_answer_that_merely_contains_the_right_one_earns_nothing(answer: str) -> None:
    reward = gym_reward("count_bits")
    assert reward.score("How many 1 bits?", f"<think>x</think>{answer}", "3", number=7) == 0.0


def test_the_right_answer_earns_1() -> None:
    assert gym_reward("count_bits").score("How many 1 bits?", "<think>x</think>3", "3", number=7) == 1.0


@given(completion=st.text(max_size=200))
def test_no_text_breaks_the_reading(completion: str) -> None:
    assert 0.0 <= score_exact("", completion, "3") <= 1.0
    assert split_trace(completion).well_formed in (True, False)


def test_a_generator_with_a_scorer_of_its_own_is_asked() -> None:
    from reasoning_gym import create_dataset

    entry = create_dataset("countdown", size=1, seed=1)[0]
    reward = gym_reward("countdown")
    row = {"metadata": entry["metadata"]}
    good = entry["metadata"]["expression"]
    assert reward.score(entry["question"], f"<think></think>{good}", entry["answer"], **row) == 1.0
    assert reward.score(entry["question"], "<think></think>1", entry["answer"], **row) < 1.0


def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"data\.task: .*did you mean count_bits"):
        check_task("count_bit")
