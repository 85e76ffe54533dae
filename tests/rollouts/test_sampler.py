"""Worker: order, seeds, text and grading."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollouts.engine import Request, Sample
from rollouts.sampler import RolloutWorker, grade, request_seed
from rollouts.trajectory import Prompt

END = 0


class EchoEngine:
    """Answers with the last prompt token, then either the end token or, for odd seeds, a cut."""

    weight_version = 8

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        self.requests += requests
        samples = []
        for request in requests:
            cut = request.seed % 2 == 1
            ids = torch.cat([request.prompt_ids[-1:], torch.tensor([END, 1] if cut else [1, END])])
            reason = "length" if cut else "stop"
            samples.append(Sample(ids, -torch.ones(3), reason, self.weight_version, torch.tensor([0.5]), None))
        return samples


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<end>": END, " ": 1, "a": 2, "b": 3, "c": 4}))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


def prompts() -> list[Prompt]:
    return [
        Prompt(torch.tensor([4, 2 + n]), f"question {n}", f"answer {n}", {"level": n}, index=10 + n) for n in range(3)
    ]


def worker(engine: EchoEngine, tokenizer: PreTrainedTokenizerFast, seed: int = 5) -> RolloutWorker:
    return RolloutWorker(engine, tokenizer, samples_per_prompt=4, max_new_tokens=7, temperature=0.5, seed=seed)


def test_trajectories_come_prompt_by_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = EchoEngine()
    trajectories = worker(engine, tokenizer).sample(prompts())
    assert [(t.prompt.index, t.sample) for t in trajectories] == [(10 + p, s) for p in range(3) for s in range(4)]
    for trajectory, request in zip(trajectories, engine.requests, strict=True):
        assert torch.equal(request.prompt_ids, trajectory.prompt_ids)
        assert request.seed == trajectory.seed == request_seed(5, trajectory.prompt.index, trajectory.sample)
        assert (request.max_new_tokens, request.temperature) == (7, 0.5)
        assert int(trajectory.completion_ids[0]) == int(trajectory.prompt_ids[-1])
        assert trajectory.action_mask.all()
        assert trajectory.rollout_logprobs.tolist() == [-1.0] * 3
        assert trajectory.weight_version == 8
        assert trajectory.routing_confidence.tolist() == [0.5]
        assert math.isnan(trajectory.reward)


def test_only_a_final_end_token_leaves_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    trajectories = worker(EchoEngine(), tokenizer).sample(prompts())
    assert {t.finish_reason for t in trajectories} == {"stop", "length"}
    for trajectory in trajectories:
        letter = "abc"[trajectory.prompt.index - 10]
        assert trajectory.completion == (f"{letter}<end> " if trajectory.truncated else f"{letter} ")


def test_seeds_are_stable_distinct_and_63_bits() -> None:
    seeds = {request_seed(run, index, sample) for run in range(5) for index in range(50) for sample in range(8)}
    assert len(seeds) == 5 * 50 * 8
    assert max(seeds) < 2**63
    assert max(seeds) > 2**62
    assert request_seed(0, 0, 0) == 6436203349130839549


def test_grading_keeps_the_order_and_passes_the_row(tokenizer: PreTrainedTokenizerFast) -> None:
    trajectories = worker(EchoEngine(), tokenizer).sample(prompts())
    received = []

    def score(items: list[dict]) -> list[SimpleNamespace]:
        received.extend(items)
        return [SimpleNamespace(value=float(n), info={"outcome": "ok", "n": n}) for n in range(len(items))]

    graded = grade(trajectories, SimpleNamespace(score=score))
    assert [t.reward for t in graded] == [float(n) for n in range(12)]
    assert graded[5].reward_info == {"outcome": "ok", "n": 5}
    assert received[5] == {
        "prompt": "question 1",
        "completion": trajectories[5].completion,
        "answer": "answer 1",
        "row": {"level": 1},
    }
    assert all(math.isnan(t.reward) for t in trajectories)


def test_zero_samples_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"rollout\.samples_per_prompt: 0"):
        RolloutWorker(EchoEngine(), tokenizer, samples_per_prompt=0, max_new_tokens=1, temperature=1.0, seed=0)
