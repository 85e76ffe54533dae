"""Evaluation by value: a scripted engine writes known completions, and the real pool grades them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mispo.config.schema import DataConfig
from mispo.data.prompts import Data, build_data, make_prompt
from mispo.data.sources import Problem
from mispo.evaluation import (
    EVAL_SEED,
    EvalSet,
    Evaluation,
    Evaluator,
    References,
    build_sets,
    constant_guess,
)
from mispo.trainer.ranks import Ranks
from mispo.warm_start.traces import careful_reference
from model.tokenizer import character_tokenizer
from rewards.pool import RewardPool
from rewards.registry import PartSpec, RewardSpec
from rollouts.environments.single_turn import SingleTurn
from rollouts.episodes import request_seed
from rollouts.trajectory import Prompt
from support.data_files import gym, jsonl
from support.scripted_engine import Script, ScriptedEngine

TOKENIZER = character_tokenizer()
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(RewardSpec({"task": PartSpec("exact")}), 1, 10) as pool:
        yield pool


def prompts(*answers: str, first: int = 1) -> list[Prompt]:
    """Prompt n asks for its answer."""
    problems = [Problem(f"say {answer}", answer, {"number": answer}) for answer in answers]
    return [make_prompt(-first - n, problem, TOKENIZER, 64) for n, problem in enumerate(problems)]


def evaluator(pool: RewardPool, script: Script, *sets: EvalSet, max_new_tokens: int = 40, **more: Any) -> Evaluator:
    settings = {"traces": 100, "temperature": 0.7, "max_new_tokens": max_new_tokens, **more}
    return Evaluator(ScriptedEngine(TOKENIZER, script), SingleTurn(), pool, TOKENIZER, ALONE, sets, **settings)


def obedient(text: str, number: int, temperature: float) -> str:
    """Right if greedy, except about 3; of sampled ones only the first, and then with some thinking."""
    answer = text.removesuffix("<|assistant|>")[-1]
    if temperature == 0:
        return "no" if answer == "3" else answer
    return f"<think>abcdef</think>{answer if number == 0 else '?'}"


def test_a_set_gives_its_greedy_and_its_sampled_accuracy(pool: RewardPool) -> None:
    measured = evaluator(pool, obedient, EvalSet("bits", prompts("1", "2", "3", "4"), 4))
    found = measured.run(5)
    assert found.metrics == {
        "eval/bits/greedy": 0.75,
        "eval/bits/avg@4": 0.25,
        "eval/response_length": 10.0,  # <think> abcdef </think> and answer, and the end token
    }
    assert list(found.metrics) == ["eval/bits/greedy", "eval/bits/avg@4", "eval/response_length"]
    assert found.samples == [
        {"question": f"say {answer}", "answer": answer, "completion": text, "reward": reward}
        for answer, text, reward in (("1", "1", 1.0), ("2", "2", 1.0), ("3", "no", 0.0), ("4", "4", 1.0))
    ]


def test_requests_are_seeded_by_prompt_and_sample_and_alike_each_time(pool: RewardPool) -> None:
    measured = evaluator(pool, obedient, EvalSet("bits", prompts("1", "2"), 2), max_new_tokens=17)
    measured.run(5)
    requests = [(r.seed, r.temperature, r.max_new_tokens) for r in measured.engine.requests]
    seeds = [request_seed(EVAL_SEED, index, sample) for index, sample in ((-1, 0), (-1, 1), (-2, 0), (-2, 1))]
    assert requests[:2] == [(seeds[0], 0.0, 17), (seeds[2], 0.0, 17)]
    assert requests[2:] == [(seed, 0.7, 17) for seed in seeds]
    measured.run(5)
    assert [(r.seed, r.temperature, r.max_new_tokens) for r in measured.engine.requests[6:]] == requests


def test_without_samples_the_length_is_that_of_the_greedy_completions(pool: RewardPool) -> None:
    found = evaluator(pool, obedient, EvalSet("bits", prompts("1", "3"), 0)).run(5)
    assert found.metrics == {"eval/bits/greedy": 0.5, "eval/response_length": 2.5}  # "1", "no", an end token each


def test_every_set_is_measured_and_the_first_gives_length_traces_and_score(pool: RewardPool) -> None:
    sets = EvalSet("held", prompts("1", "2"), 0), EvalSet("far", prompts("3", "4", "5", first=3), 2)
    measured = evaluator(pool, obedient, *sets)
    found = measured.run(5)
    assert found.metrics == {
        "eval/held/greedy": 1.0,
        "eval/response_length": 2.0,
        "eval/far/greedy": pytest.approx(2 / 3),
        "eval/far/avg@2": 0.5,
    }
    assert [row["question"] for row in found.samples] == ["say 1", "say 2"]
    assert measured.score == 1.0


def test_completions_that_are_cut_are_graded_too(pool: RewardPool) -> None:
    found = evaluator(pool, lambda *_: "1" + "0" * 9, EvalSet("bits", prompts("1", "10"), 0), max_new_tokens=2).run(5)
    assert found.metrics == {"eval/bits/greedy": 0.5, "eval/response_length": 2.0}
    assert [row["completion"] for row in found.samples] == ["10", "10"]


def test_the_last_score_and_its_step_survive_a_resume(pool: RewardPool) -> None:
    one, two = (evaluator(pool, obedient, EvalSet("bits", prompts("1", "3"), 0)) for _ in range(2))
    assert one.state() == {"step": 0, "score": None}
    one.run(7)
    assert one.state() == {"step": 7, "score": 0.5}
    two.restore(one.state())
    assert two.state() == {"step": 7, "score": 0.5}


def test_without_sets_there_is_nothing_to_measure_and_no_engine_needed(pool: RewardPool) -> None:
    measured = Evaluator(
        None, SingleTurn(), pool, TOKENIZER, ALONE, (), 8, 1.0, 9, [constant_guess, careful_reference("x", [])]
    )
    assert measured.run(3) == measured.baseline() == Evaluation({}, [], [])
    assert measured.score is None


def test_the_baseline_has_its_references_and_notes_about_them(pool: RewardPool) -> None:
    references = [constant_guess, lambda evaluator: References({"reference/sets": len(evaluator.sets)}, ["one", "two"])]
    sets = EvalSet("held", prompts("3", "4", "3", "5", "3"), 0), EvalSet("far", prompts("1"), 0)
    measured = evaluator(pool, obedient, *sets, traces=2, references=references)
    found = measured.baseline()
    assert list(found.metrics.items()) == [
        ("eval/held/greedy", 0.4),
        ("eval/response_length", pytest.approx((3 * 3 + 2 * 2) / 5)),  # "no" and an end token, or a digit and that
        ("eval/far/greedy", 1.0),
        ("reference/constant_guess", 0.6),
        ("reference/sets", 2),
    ]
    assert found.notes == ["Always giving the most frequent answer would be right in 60% of the cases.", "one", "two"]
    assert [row["answer"] for row in found.samples] == ["3", "4"]
    assert measured.state() == {"step": 0, "score": 0.4}


def test_a_forced_beginning_belongs_to_the_completion_and_costs_no_tokens(pool: RewardPool) -> None:
    seen = []

    def script(text: str, number: int, temperature: float) -> str:
        seen.append(text)
        return "</think>1" if text.endswith("<think>a") else "no"

    measured = evaluator(pool, script, max_new_tokens=3)
    forced = measured.forced(prompts("1", "2", "1"), lambda prompt: "<think>" + ("b" if prompt.index == -3 else "a"))
    assert forced == pytest.approx(1 / 3)  # "<think>a</think>1" is right for the first prompt alone
    assert seen == ["<|user|>say 1<|assistant|><think>a", "<|user|>say 2<|assistant|><think>a",
                    "<|user|>say 1<|assistant|><think>b"]  # fmt: skip


def test_the_toy_measures_what_forced_thinking_gives(pool: RewardPool) -> None:
    heldout = build_data(gym(), TOKENIZER).heldout

    def thinks(text: str, number: int, temperature: float) -> str:
        """Right about odd numbers, once the first character of the number stands in the think block."""
        asked, _, opening = text.partition("?<|assistant|>")
        asked_number = asked.removeprefix("<|user|>ones in ")
        assert opening == f"<think>{asked_number[0]}"
        return f"</think>{bin(int(asked_number)).count('1') if int(asked_number) % 2 else 0}"

    measured = evaluator(pool, thinks)
    found = careful_reference("count_bits", heldout)(measured)
    share = sum(prompt.row["number"] % 2 for prompt in heldout) / len(heldout)
    assert found.metrics == {"reference/forced_careful": share}
    assert f"already gives {share:.0%}: what RL teaches here" in found.notes[0]
    assert careful_reference("chain_sum", heldout)(measured) == References({}, [])
    assert careful_reference("count_bits", [])(measured) == References({}, [])


class SetConfig(DataConfig):
    """As eval.sets.NAME will be: a source's settings, how many problems of it, and samples of each."""

    def __init__(self, size: int | None, samples: int | None, **source: Any) -> None:
        super().__init__(**source)
        self.size, self.samples = size, samples


def sets_of(data: Data, **sets: SetConfig) -> list[EvalSet]:
    return build_sets(data, sets, TOKENIZER, samples=3, seed=0, max_prompt_tokens=32)


def test_the_held_out_problems_come_first_and_further_sets_follow(tmp_path: Path) -> None:
    data = build_data(gym(), TOKENIZER)
    path = str(jsonl(tmp_path / "sums.jsonl", [{"question": f"{i}+1", "answer": i + 1} for i in range(5)]))
    sets = sets_of(data, sums=SetConfig(None, None, path=path), some=SetConfig(2, 0, path=path))
    assert [(each.name, len(each.prompts), each.samples) for each in sets] == [
        ("count_bits", 16, 3), ("sums", 5, 3), ("some", 2, 0),
    ]  # fmt: skip
    assert [(prompt.text, prompt.answer) for prompt in sets[2].prompts] == [("0+1", "1"), ("1+1", "2")]
    indices = [prompt.index for each in sets for prompt in each.prompts]
    assert indices == list(range(-1, -24, -1))  # seeds that no two problems share


def test_without_held_out_problems_the_first_set_is_the_next(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "sums.jsonl", [{"question": "1+1", "answer": 2}]))
    sets = sets_of(build_data(gym(eval_size=0), TOKENIZER), sums=SetConfig(None, None, path=path))
    assert [each.name for each in sets] == ["sums"]


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("count_bits", SetConfig(1, None, path="d.jsonl"), r"eval\.sets\.count_bits: .* have this name"),
        ("far", SetConfig(1, None, path="gone.jsonl"), r"eval\.sets\.far\.path: no such file"),
        ("far", SetConfig(None, None, task="count_bits"), r"eval\.sets\.far\.size: a generator has no end"),
    ],
)
def test_a_set_that_does_not_open_is_named(name: str, config: SetConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sets_of(build_data(gym(), TOKENIZER), **{name: config})
