"""Several sources in one stream: their shares, their own order, resuming anywhere, and what is held out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mispo.config.schema import DataConfig
from mispo.data.mixture import Interleaving, Mixture, open_mixture
from mispo.data.prompts import build_data
from mispo.data.sources import Problem
from model.tokenizer import character_tokenizer
from support.data_files import BITS, file, jsonl, texts

TOKENIZER = character_tokenizer()

weights = st.dictionaries(st.sampled_from("abcde"), st.floats(1e-3, 1e3), min_size=1, max_size=5)


@dataclass
class Mixed:
    """As data.mixture.NAME will be: a source's settings and its weight."""

    weight: float = 1.0
    task: str | None = None
    task_args: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    split: str = "train"
    prompt: str = "{question}"
    answer: str = "answer"


def bits(weight: float = 1.0) -> Mixed:
    return Mixed(weight, task="count_bits", task_args={"max_n": 255}, prompt="ones in {number}?")


def sums(tmp_path: Path, weight: float = 1.0) -> Mixed:
    rows = [{"problem": f"{i}+{i}", "solution": 2 * i} for i in range(40)]
    path = jsonl(tmp_path / "sums.jsonl", rows)
    return Mixed(weight, path=str(path), prompt="What is {problem}?", answer="solution")


def mixed_data(mixture: dict[str, Mixed], eval_size: int = 12) -> Any:
    return build_data(DataConfig(eval_size=eval_size, max_prompt_tokens=32), TOKENIZER, mixture)


@given(weights=weights, seed=st.integers(0, 9), length=st.integers(1, 300))
@settings(max_examples=60)
def test_each_source_has_its_share_of_every_beginning_and_keeps_its_order(
    weights: dict[str, float], seed: int, length: int
) -> None:
    interleaving = Interleaving(weights, seed)
    places = [interleaving.place(position) for position in range(length)]
    seen: Counter[str] = Counter()
    for number, (name, own) in enumerate(places, 1):
        assert own == seen[name]
        seen[name] += 1
        for each, weight in weights.items():
            share = weight / sum(weights.values())
            assert abs(seen[each] - number * share) <= 1 + share * len(weights) + 1e-6


def test_positions_are_those_of_sorting_all_problems_by_their_times() -> None:
    interleaving = Interleaving({"a": 5.0, "b": 1.0, "c": 0.3}, seed=4)
    times = []
    for name, weight in interleaving.weights.items():
        share = weight / 6.3
        times += [((k + interleaving._jitter(name, k)) / share, name, k) for k in range(2000)]
    expected = [(name, k) for _, name, k in sorted(times)[:500]]
    assert [interleaving.place(position) for position in range(500)] == expected


def test_which_positions_a_source_has_depends_on_the_seed_and_not_on_the_order_of_the_sources() -> None:
    def names(weights: dict[str, float], seed: int) -> list[str]:
        return [Interleaving(weights, seed).place(position)[0] for position in range(60)]

    assert names({"a": 1, "b": 2}, 0) == names({"b": 2, "a": 1}, 0)
    assert names({"a": 1, "b": 2}, 0) != names({"a": 1, "b": 2}, 1)
    assert names({"a": 1, "b": 2}, 0) == names({"a": 10, "b": 20}, 0)
    assert names({"a": 1, "b": 2}, 0)[:57] != names({"a": 1, "b": 2}, 0)[3:]  # no pattern that repeats


def test_late_positions_cost_no_more_and_keep_the_shares() -> None:
    interleaving = Interleaving({"a": 0.9, "b": 0.1}, 0)
    counts = Counter(interleaving.place(position)[0] for position in range(10**9, 10**9 + 1000))
    assert counts["b"] == pytest.approx(100, abs=3)


def test_the_stream_has_both_sources_each_with_its_own_columns(tmp_path: Path) -> None:
    prompts = mixed_data({"bits": bits(3.0), "sums": sums(tmp_path)}).stream.take(400)
    by_source = {name: [p for p in prompts if p.row["source"] == name] for name in ("bits", "sums")}
    assert len(by_source["bits"]) == pytest.approx(300, abs=2)  # though one in six of the generator's is held out
    for prompt in by_source["bits"]:
        assert prompt.text == f"ones in {prompt.row['number']}?"
    for prompt in by_source["sums"]:
        assert prompt.text == f"What is {prompt.row['problem']}?"
        assert prompt.answer == str(prompt.row["solution"])
    assert len({prompt.index for prompt in prompts}) == 400


def test_a_file_in_a_mixture_comes_to_its_end_before_it_begins_again(tmp_path: Path) -> None:
    data = mixed_data({"bits": bits(), "sums": sums(tmp_path)}, eval_size=8)
    rows = [prompt.text for prompt in data.stream.take(400) if prompt.row["source"] == "sums"]
    size = 40 - sum(prompt.row["source"] == "sums" for prompt in data.heldout)
    assert len(set(rows[:size])) == size
    assert set(rows[size : 2 * size]) == set(rows[:size])
    assert rows[size : 2 * size] != rows[:size]


@pytest.mark.parametrize("start", [0, 1, 17, 333])
def test_the_cursor_is_the_whole_state_of_a_mixture(tmp_path: Path, start: int) -> None:
    mixture = {"bits": bits(0.7), "sums": sums(tmp_path, 0.3)}
    whole = mixed_data(mixture).stream
    whole.take(start)
    state, expected = whole.state(), whole.take(40)
    fresh = mixed_data(mixture).stream
    fresh.restore(state)
    again = fresh.take(40)
    assert [(p.index, p.text, p.row) for p in again] == [(p.index, p.text, p.row) for p in expected]


def test_held_out_problems_have_the_shares_of_the_stream_and_never_come_up(tmp_path: Path) -> None:
    data = mixed_data({"bits": bits(2.0), "sums": sums(tmp_path)})
    assert data.name == "mixture"
    assert Counter(prompt.row["source"] for prompt in data.heldout)["bits"] == pytest.approx(8, abs=1)
    assert len(set(texts(data.heldout))) == 12
    assert not set(texts(data.heldout)) & set(texts(data.stream.take(2000)))


def test_what_one_source_holds_out_another_does_not_bring_up(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": i} for i in range(20)]
    twice = [Mixed(path=str(jsonl(tmp_path / name, rows))) for name in ("a.jsonl", "b.jsonl")]
    data = mixed_data(dict(zip("ab", twice, strict=True)), eval_size=10)
    held_out = set(texts(data.heldout))
    assert set(texts(data.stream.take(400))) == {f"q{i}" for i in range(20)} - held_out


@dataclass
class Numbers:
    """In place of a data set: problems that say which source and position they come from; some are held out."""

    name: str
    skipped: set[int]
    heldout: Sequence[Problem] = ()

    def problem(self, position: int) -> Problem | None:
        return None if position in self.skipped else Problem(f"{self.name}{position}", "", {})


def test_a_held_out_problem_is_replaced_by_a_later_one_of_its_source() -> None:
    sources = {"a": Numbers("a", {2, 5}), "b": Numbers("b", set())}
    mixture = Mixture(sources, Interleaving({"a": 1.0, "b": 1.0}, 0), 0)
    found = [problem for position in range(20) if (problem := mixture.problem(position))]
    assert len(found) == 20
    assert [p.text for p in found if p.row["source"] == "a"][:7] == [
        "a0", "a1", f"a{2 + 2**24}", "a3", "a4", f"a{5 + 2**24}", "a6",
    ]  # fmt: skip


def test_a_mixture_of_one_source_is_that_source() -> None:
    single = build_data(DataConfig(**{**BITS, "eval_size": 12}), TOKENIZER)
    mixed = mixed_data({"bits": bits(0.3)})
    assert mixed.name == "bits"
    for a, b in ((single.heldout, mixed.heldout), (single.stream.take(300), mixed.stream.take(300))):
        assert [(p.index, p.text, p.answer, p.row) for p in a] == [(p.index, p.text, p.answer, p.row) for p in b]


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ({"a": bits(0.0)}, r"data\.mixture\.a\.weight: must be above 0 \(is 0\.0\)"),
        ({"a": bits(), "b": bits(float("inf"))}, r"data\.mixture\.b\.weight"),
        ({"a": bits(), "b": Mixed()}, r"data\.mixture\.b: set exactly one of data\.mixture\.b\.task and"),
        ({"a": bits(), "b": Mixed(path="gone.jsonl")}, r"data\.mixture\.b\.path: no such file"),
    ],
)
def test_errors_name_the_source(mixture: dict[str, Mixed], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_mixture(mixture, seed=0, held_out=4)


def test_a_mixture_beside_a_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.mixture: cannot be combined with data\.task and data\.path"):
        build_data(file(Path("some.jsonl")), TOKENIZER, {"a": bits()})
