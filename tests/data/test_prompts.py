"""Prompts for training and the held-out ones: repeatable, disjoint, and within their budget."""

from pathlib import Path

import pytest

from mispo.data.prompts import build_data
from mispo.data.sources import HELD_OUT_SHARE, question_hash
from model.tokenizer import character_tokenizer
from support.data_files import file, gym, jsonl, texts

TOKENIZER = character_tokenizer()


def test_a_generator_makes_templated_prompts_with_its_metadata_as_columns() -> None:
    (prompt,) = build_data(gym(), TOKENIZER).stream.take(1)
    number = prompt.row["number"]
    assert prompt.text == f"ones in {number}?"
    assert TOKENIZER.decode(prompt.ids) == f"<|user|>ones in {number}?<|assistant|>"
    assert prompt.answer == str(bin(number).count("1"))


def test_which_problems_come_and_which_are_held_out_never_changes(tmp_path: Path) -> None:
    """Runs that are resumed, and numbers that were published, depend on these."""
    data = build_data(gym(), TOKENIZER)
    assert [prompt.row["number"] for prompt in data.heldout[:6]] == [122, 67, 134, 237, 97, 136]
    assert [prompt.row["number"] for prompt in data.stream.take(8)] == [217, 35, 245, 61, 61, 160, 204, 83]
    rows = [{"question": f"q{i % 17}?", "answer": i % 17, "row": i} for i in range(40)]
    data = build_data(file(jsonl(tmp_path / "d.jsonl", rows), eval_size=5, seed=2), TOKENIZER)
    assert texts(data.heldout) == ["q16?", "q5?", "q4?", "q0?", "q3?"]
    assert [prompt.row["row"] for prompt in data.stream.take(8)] == [23, 31, 29, 11, 25, 27, 35, 10]


def test_no_training_prompt_is_ever_held_out() -> None:
    data = build_data(gym(), TOKENIZER)
    held_out = set(texts(data.heldout))
    assert len(held_out) == len(data.heldout) == 16
    assert not held_out & set(texts(data.stream.take(2000)))
    assert all(question_hash(p.row["question"]) < HELD_OUT_SHARE for p in data.heldout)


def test_held_out_problems_do_not_depend_on_the_seed_of_the_run_and_never_share_a_training_index() -> None:
    one, two = (build_data(gym(), TOKENIZER) for _ in range(2))
    assert texts(one.heldout) == texts(two.heldout)
    assert [prompt.index for prompt in one.heldout] == [-1 - n for n in range(16)]
    assert all(prompt.index >= 0 for prompt in one.stream.take(50))


def test_the_cursor_is_the_whole_state_of_the_stream() -> None:
    whole = build_data(gym(), TOKENIZER).stream
    whole.take(7)
    state, expected = whole.state(), texts(whole.take(9))
    fresh = build_data(gym(), TOKENIZER).stream
    fresh.restore(state)
    assert texts(fresh.take(9)) == expected
    assert fresh.state() == whole.state() == {"cursor": whole.cursor}


def test_the_held_out_problems_are_named_after_their_task_or_file(tmp_path: Path) -> None:
    assert build_data(gym(), TOKENIZER).name == "count_bits"
    path = jsonl(tmp_path / "sums.jsonl", [{"question": "q", "answer": "1"}])
    assert build_data(file(path), TOKENIZER).name == "sums"


def test_a_prompt_over_the_budget_is_an_error_and_never_cut() -> None:
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens: row -?\d+ has \d+ tokens, 12 are allowed"):
        build_data(gym(max_prompt_tokens=12), TOKENIZER)


def test_data_without_a_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data: set exactly one of data\.task and data\.path"):
        build_data(gym(task=None), TOKENIZER)
