"""Prompts from generators and files: repeatable, disjoint from what is held out, and clear about bad rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mispo.config.schema import DataConfig
from mispo.data.prompts import HELD_OUT_SHARE, build_data, question_hash
from model.tokenizer import character_tokenizer
from rollouts.trajectory import Prompt

TOKENIZER = character_tokenizer()
BITS = {"task": "count_bits", "task_args": {"max_n": 255}, "prompt": "ones in {number}?", "max_prompt_tokens": 32}


def gym(**changes: Any) -> DataConfig:
    return DataConfig(**{**BITS, "eval_size": 16, **changes})


def file(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(path=str(path), eval_size=0, **changes)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_a_generator_makes_templated_prompts_with_its_metadata_as_columns() -> None:
    (prompt,) = build_data(gym(), TOKENIZER).stream.take(1)
    number = prompt.row["number"]
    assert prompt.text == f"ones in {number}?"
    assert TOKENIZER.decode(prompt.ids) == f"<|user|>ones in {number}?<|assistant|>"
    assert prompt.answer == str(bin(number).count("1"))


def test_no_training_prompt_is_ever_held_out() -> None:
    data = build_data(gym(), TOKENIZER)
    held_out = set(texts(data.heldout))
    assert len(held_out) == len(data.heldout) == 16
    assert not held_out & set(texts(data.stream.take(2000)))
    assert all(question_hash(p.row["question"]) < HELD_OUT_SHARE for p in data.heldout)


def test_held_out_problems_do_not_depend_on_the_seed_of_the_run_and_never_share_a_training_index() -> None:
    one, two = (build_data(gym(), TOKENIZER) for _ in range(2))
    assert texts(one.heldout) == texts(two.heldout)
    assert all(prompt.index < 0 for prompt in one.heldout)
    assert all(prompt.index >= 0 for prompt in one.stream.take(50))


def test_the_cursor_is_the_whole_state_of_the_stream() -> None:
    whole = build_data(gym(), TOKENIZER).stream
    whole.take(7)
    cursor, expected = whole.cursor, texts(whole.take(9))
    fresh = build_data(gym(), TOKENIZER).stream
    fresh.cursor = cursor
    assert texts(fresh.take(9)) == expected


def test_a_file_is_read_in_a_new_order_each_epoch(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": i} for i in range(10)]
    stream = build_data(file(jsonl(tmp_path / "d.jsonl", rows)), TOKENIZER).stream
    first, second = texts(stream.take(10)), texts(stream.take(10))
    assert sorted(first) == sorted(second) == sorted(f"q{i}" for i in range(10))
    assert first != second
    stream.cursor = 5
    assert texts(stream.take(3)) == first[5:8]


def test_a_file_holds_out_questions_not_rows(tmp_path: Path) -> None:
    rows = [{"question": f"q{i % 10}", "answer": i % 10, "row": i} for i in range(30)]
    data = build_data(DataConfig(path=str(jsonl(tmp_path / "d.jsonl", rows)), eval_size=4), TOKENIZER)
    held_out = set(texts(data.heldout))
    assert len(held_out) == 4
    assert held_out | set(texts(data.stream.take(60))) == {f"q{i}" for i in range(10)}
    assert not held_out & set(texts(data.stream.take(60)))


def test_parquet_and_jsonl_are_the_same_data(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": str(i), "level": i} for i in range(5)]
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    sources = (file(tmp_path / "d.parquet"), file(jsonl(tmp_path / "d.jsonl", rows)))
    a, b = (build_data(config, TOKENIZER).stream.take(5) for config in sources)
    assert [(p.text, p.answer, p.row) for p in a] == [(p.text, p.answer, p.row) for p in b]


def test_a_prompt_may_be_built_from_other_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"problem": "1+1", "solution": "2"}])
    config = file(path, prompt="Solve {problem}", answer="solution")
    (prompt,) = build_data(config, TOKENIZER).stream.take(1)
    assert (prompt.text, prompt.answer) == ("Solve 1+1", "2")


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([], {}, r"data\.path: .* is empty"),
        ([{"question": "q"}], {}, r"data\.answer: row 0 .* has no 'answer'; its columns are question"),
        ([{"question": "q", "answer": "1"}, {"question": "r", "answer": ""}], {}, r"data\.answer: row 1"),
        ([{"problem": "q", "answer": "1"}], {}, r"data\.prompt: row 0 .* has no 'question'; its columns are problem"),
        ([{"question": "q", "answer": "1"}], {"prompt": "{text}"}, r"data\.prompt: row 0 .* has no 'text'"),
        ([["q", "1"]], {}, r"data\.path: .* line 1 is no object"),
        ([{"question": "q", "answer": "1"}], {"eval_size": 1}, r"data\.eval_size: 1 of only 1 different"),
    ],
)
def test_bad_rows_are_named_when_the_file_is_opened(
    tmp_path: Path, rows: list[Any], changes: dict[str, Any], words: str
) -> None:
    config = DataConfig(**{"path": str(jsonl(tmp_path / "d.jsonl", rows)), "eval_size": 0, **changes})
    with pytest.raises(ValueError, match=words):
        build_data(config, TOKENIZER)


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"question": "q", "answer": "1"}\n{"quest')
    (tmp_path / "d.parquet").write_bytes(b"no parquet at all")
    for name, words in (
        ("d.jsonl", "line 2 is not JSON"),
        ("d.parquet", "does not open as parquet"),
        ("gone.jsonl", r"data\.path: no such file"),
    ):
        with pytest.raises(ValueError, match=words):
            build_data(file(tmp_path / name), TOKENIZER)


def test_a_prompt_over_the_budget_is_an_error_and_never_cut() -> None:
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens: row -?\d+ has \d+ tokens, 12 are allowed"):
        build_data(gym(max_prompt_tokens=12), TOKENIZER)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "count_bit"}, "did you mean count_bits"),
        ({"task_args": {"max": 5}}, r"data\.task_args: count_bits does not take"),
        ({"task_args": {"max_n": 7}}, r"data\.eval_size: 16 held-out problems, but count_bits has only"),
        ({"prompt": "{nummer}"}, r"data\.prompt: '\{nummer\}' asks for a column 'nummer'"),
    ],
)
def test_a_wrong_generator_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_data(gym(**changes), TOKENIZER)


def test_a_data_set_that_does_not_load_is_named() -> None:
    with pytest.raises(ValueError, match=r"data\.path: 'nobody/nothing' \(data\.split 'train'\) does not load"):
        build_data(DataConfig(path="nobody/nothing"), TOKENIZER)
