"""Generators and files as sources: every row once per epoch, held out by question, and clear about bad rows."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mispo.data.sources import Problem, Source, evaluation_problems, open_source
from support.data_files import file, gym, jsonl


def opened(config: Any) -> Source:
    return open_source(config, seed=config.seed, held_out=config.eval_size)


def take(source: Source, start: int, count: int) -> list[Problem]:
    return [found for position in range(start, start + count) if (found := source.problem(position))]


def texts(problems: Any) -> list[str]:
    return [problem.text for problem in problems]


def test_a_file_is_read_in_a_new_order_each_epoch(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": i} for i in range(10)]
    source = opened(file(jsonl(tmp_path / "d.jsonl", rows)))
    first, second = texts(take(source, 0, 10)), texts(take(source, 10, 10))
    assert sorted(first) == sorted(second) == sorted(f"q{i}" for i in range(10))
    assert first != second
    assert texts(take(source, 5, 3)) == first[5:8]


def test_a_file_holds_out_questions_not_rows(tmp_path: Path) -> None:
    rows = [{"question": f"q{i % 10}", "answer": i % 10, "row": i} for i in range(30)]
    source = opened(file(jsonl(tmp_path / "d.jsonl", rows), eval_size=4))
    held_out, trained = set(texts(source.heldout)), set(texts(take(source, 0, 60)))
    assert len(held_out) == 4
    assert held_out | trained == {f"q{i}" for i in range(10)}
    assert not held_out & trained
    assert all(problem.row["row"] < 10 for problem in source.heldout)  # the first row of each question


def test_parquet_and_jsonl_are_the_same_data(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": str(i), "level": i} for i in range(5)]
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    a, b = (opened(file(path)) for path in (tmp_path / "d.parquet", jsonl(tmp_path / "d.jsonl", rows)))
    assert [asdict(problem) for problem in take(a, 0, 5)] == [asdict(problem) for problem in take(b, 0, 5)]


def test_a_problem_may_be_built_from_other_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"problem": "1+1", "solution": 2}])
    (problem,) = take(opened(file(path, prompt="Solve {problem}", answer="solution")), 0, 1)
    assert problem == Problem("Solve 1+1", "2", {"problem": "1+1", "solution": 2})


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([], {}, r"data\.path: .* is empty"),
        ([{"question": "q"}], {}, r"data\.answer: row 0 .* has no 'answer'; its columns are question"),
        ([{"question": "q", "answer": "1"}, {"question": "r", "answer": ""}], {}, r"data\.answer: row 1"),
        ([{"problem": "q", "answer": "1"}], {}, r"data\.prompt: row 0 .* has no 'question'; its columns are problem"),
        ([{"question": "q", "answer": "1"}], {"prompt": "{text}"}, r"data\.prompt: row 0 .* has no 'text'"),
        ([["q", "1"]], {}, r"data\.path: .* line 1 is not a JSON object"),
        ([{"question": "q", "answer": "1"}], {"eval_size": 1}, r"data\.eval_size: 1 of only 1 different"),
    ],
)
def test_bad_rows_are_named_when_the_file_is_opened(
    tmp_path: Path, rows: list[Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        opened(file(jsonl(tmp_path / "d.jsonl", rows), **changes))


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"question": "q", "answer": "1"}\n{"quest')
    (tmp_path / "d.parquet").write_bytes(b"no parquet at all")
    for name, words in (
        ("d.jsonl", "line 2 is not JSON"),
        ("d.parquet", "does not open as parquet"),
        ("gone.jsonl", r"data\.path: no such file"),
    ):
        with pytest.raises(ValueError, match=words):
            opened(file(tmp_path / name))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "count_bit"}, r"data\.task: .*did you mean count_bits"),
        ({"task_args": {"max": 5}}, r"data\.task_args: count_bits does not take"),
        ({"task_args": {"max_n": 7}}, r"data\.eval_size: 16 held-out problems, but count_bits has only"),
        ({"prompt": "{nummer}"}, r"data\.prompt: '\{nummer\}' asks for a column 'nummer'"),
    ],
)
def test_a_wrong_generator_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        opened(gym(**changes))


def test_a_data_set_that_does_not_load_is_named() -> None:
    with pytest.raises(ValueError, match=r"data\.path: 'nobody/nothing' \(data\.split 'train'\) does not load"):
        opened(file(Path("nobody/nothing")))


def test_an_evaluation_set_of_a_file_is_its_first_rows(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": i} for i in range(5)]
    config = file(jsonl(tmp_path / "d.jsonl", rows))
    assert texts(evaluation_problems(config, 3, seed=0, section="eval.sets.s")) == ["q0", "q1", "q2"]
    assert texts(evaluation_problems(config, None, seed=0, section="eval.sets.s")) == [f"q{i}" for i in range(5)]


def test_an_evaluation_set_of_a_generator_is_never_trained_on() -> None:
    problems = evaluation_problems(gym(), 24, seed=9, section="eval.sets.s")
    assert len(set(texts(problems))) == 24
    assert not set(texts(problems)) & set(texts(take(opened(gym()), 0, 2000)))


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({}, None, r"eval\.sets\.s\.size: a generator has no end"),
        ({"task_args": {"max_n": 7}}, 16, r"eval\.sets\.s\.size: 16 .* widen eval\.sets\.s\.task_args"),
        ({"task": "count_bit"}, 1, r"eval\.sets\.s\.task: .*did you mean count_bits"),
        ({"task": None}, 1, r"eval\.sets\.s: set exactly one of eval\.sets\.s\.task and eval\.sets\.s\.path"),
        ({"task": None, "path": "gone.jsonl"}, 1, r"eval\.sets\.s\.path: no such file"),
    ],
)
def test_errors_name_the_evaluation_set(changes: dict[str, Any], size: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluation_problems(gym(**changes), size, seed=0, section="eval.sets.s")
