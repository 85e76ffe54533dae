"""Trajectories of one turn and of several: order, seeds, masks, text, the token limit."""

import math

import pytest
import torch
from torch import Tensor

from model.moe.routers import RoutingRecorder
from rollouts.engine import Request, Sample, run_all
from rollouts.environments.single_turn import SingleTurn
from rollouts.episodes import Episode, Sampling, assemble, continued, next_request, play, play_all, request_seed
from rollouts.native.engine import NativeEngine
from rollouts.trajectory import Prompt, Trajectory, Turn
from support.engines import EchoEngine
from support.tiny_models import tiny_model
from support.trajectories import letter_prompts, letters

FOUR = Sampling(samples_per_prompt=4, max_new_tokens=7, temperature=0.5, seed=5)


def test_trajectories_come_prompt_by_prompt() -> None:
    """Although the engine ends the last request first."""
    engine = EchoEngine()
    trajectories = play_all(engine, SingleTurn(), letters(), letter_prompts(), FOUR)
    assert [(t.prompt.index, t.sample) for t in trajectories] == [(10 + p, s) for p in range(3) for s in range(4)]
    for trajectory, request in zip(trajectories, engine.requests, strict=True):
        assert torch.equal(request.prompt_ids, trajectory.prompt_ids)
        assert request.seed == trajectory.seed == request_seed(5, trajectory.prompt.index, trajectory.sample)
        assert (request.max_new_tokens, request.temperature) == (7, 0.5)
        assert int(trajectory.completion_ids[0]) == int(trajectory.prompt_ids[-1])
        assert trajectory.action_mask.tolist() == [True] * 3
        assert trajectory.rollout_logprobs.tolist() == [-1.0] * 3
        assert trajectory.weight_version == 8
        assert trajectory.turns == (Turn((0, 3), 8, trajectory.finish_reason),)
        assert math.isnan(trajectory.reward)


def test_only_a_final_end_token_leaves_the_text() -> None:
    trajectories = play_all(EchoEngine(), SingleTurn(), letters(), letter_prompts(), FOUR)
    assert {t.finish_reason for t in trajectories} == {"stop", "length"}
    for trajectory in trajectories:
        letter = "abc"[trajectory.prompt.index - 10]
        assert trajectory.completion == (f"{letter}<end> " if trajectory.truncated else f"{letter} ")


def test_seeds_are_stable_distinct_and_63_bits() -> None:
    seeds = {
        request_seed(run, index, sample, turn)
        for run in range(5)
        for index in range(50)
        for sample in range(8)
        for turn in range(3)
    }
    assert len(seeds) == 5 * 50 * 8 * 3
    assert max(seeds) < 2**63
    assert max(seeds) > 2**62
    assert request_seed(0, 0, 0) == 6436203349130839549


def test_zero_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout\.samples_per_prompt must be at least 1 \(is 0\)"):
        Sampling(samples_per_prompt=0, max_new_tokens=1, temperature=1.0, seed=0)


@pytest.mark.parametrize("looks", [0, 1, 5])
def test_what_still_runs_is_cancelled_when_a_stop_is_asked_for(looks: int) -> None:
    engine = EchoEngine()
    left = iter([False] * looks + [True])
    ended = [
        pair for pairs in play(engine, SingleTurn(), letters(), letter_prompts(), FOUR, left.__next__) for pair in pairs
    ]
    assert len(ended) == looks
    assert len(engine.cancelled) == 12 - looks
    assert not engine.running


def test_what_still_runs_is_cancelled_when_the_caller_leaves() -> None:
    engine = EchoEngine()

    def fails() -> None:
        for _ in play(engine, SingleTurn(), letters(), letter_prompts(), FOUR):
            raise ValueError("somewhere else")

    with pytest.raises(ValueError, match="somewhere else"):
        fails()
    assert len(engine.cancelled) == 11
    assert not engine.running


class Opened(SingleTurn):
    """Begins with one more token."""

    def start(self, prompt: Prompt) -> Tensor:
        return torch.cat([prompt.ids, torch.tensor([3])])


def test_the_environment_says_what_the_engine_begins_with() -> None:
    (trajectory, *_) = play_all(EchoEngine(), Opened(), letters(), letter_prompts(1), FOUR)
    assert trajectory.prompt_ids.tolist() == [4, 2, 3]
    assert trajectory.prompt.text == "question 0"
    assert trajectory.completion.startswith("b")


AGAIN, DONE = 1, 2
REPLY = torch.tensor([30, 31, 32])


class AskAgain:
    """Two end tokens: after the first one the engine is asked again, after the second the trajectory is over."""

    def start(self, prompt: Prompt) -> Tensor:
        return prompt.ids

    def reply(self, sample: Sample) -> Tensor | None:
        return REPLY if int(sample.completion_ids[-1]) == AGAIN else None


def played() -> tuple[NativeEngine, list[Trajectory]]:
    engine = NativeEngine(tiny_model("step"), (AGAIN, DONE), 0, 5, record_experts=True)
    prompts = [Prompt(torch.tensor([5, 6 + n]), "", "", {}, n) for n in range(12)]
    return engine, play_all(engine, AskAgain(), letters(), prompts, LONG)


LONG = Sampling(samples_per_prompt=3, max_new_tokens=60, temperature=1.2, seed=0)


def by_hand(engine: NativeEngine, trajectory: Trajectory) -> tuple[list[int], list[bool], str]:
    """Token by token the same trajectory as a plain loop over requests: ids, which of them the engine wrote, why it
    ended."""
    ids, wrote, turn = [], [], 0
    while True:
        prompt = torch.tensor([*trajectory.prompt_ids.tolist(), *ids])
        seed = request_seed(LONG.seed, trajectory.prompt.index, trajectory.sample, turn)
        (sample,) = run_all(engine, [Request(prompt, seed, LONG.max_new_tokens - len(ids), LONG.temperature)])
        ids += sample.completion_ids.tolist()
        wrote += [True] * len(sample.completion_ids)
        if ids[-1] != AGAIN:
            return ids, wrote, sample.finish_reason
        if len(ids) + len(REPLY) >= LONG.max_new_tokens:
            return ids, wrote, "length"
        ids += REPLY.tolist()
        wrote += [False] * len(REPLY)
        turn += 1


def test_a_trajectory_of_several_turns_is_that_of_a_plain_loop() -> None:
    engine, trajectories = played()
    assert {len(t.turns) for t in trajectories} >= {1, 2, 3}
    assert {t.finish_reason for t in trajectories} == {"stop", "length"}
    for trajectory in trajectories:
        ids, wrote, reason = by_hand(engine, trajectory)
        assert trajectory.completion_ids.tolist() == ids
        assert trajectory.action_mask.tolist() == wrote
        assert trajectory.finish_reason == reason
        assert len(ids) <= LONG.max_new_tokens
        spanned = torch.zeros(len(ids), dtype=torch.bool)
        for turn in trajectory.turns:
            spanned[slice(*turn.span)] = True
        assert torch.equal(spanned, trajectory.action_mask)


def test_what_is_recorded_of_several_turns_is_that_of_one_forward_over_them() -> None:
    engine, trajectories = played()
    scores = engine.score([(t.prompt_ids, t.completion_ids) for t in trajectories], LONG.temperature)
    for trajectory, score in zip(trajectories, scores, strict=True):
        mask = trajectory.action_mask
        assert float((trajectory.rollout_logprobs - score)[mask].abs().max()) <= 1e-5
        assert trajectory.rollout_logprobs[~mask].count_nonzero() == 0
        whole = torch.cat([trajectory.prompt_ids, trajectory.completion_ids])
        with torch.no_grad(), RoutingRecorder(engine.model) as recorder:
            engine.model(input_ids=whole[None, :-1])
            routing = recorder.take()
        experts = trajectory.routed_experts
        assert torch.equal(experts.sort(-1).values, routing.experts.transpose(0, 1).sort(-1).values)
        predicting = routing.confidence[:, len(trajectory.prompt_ids) - 1 :][:, mask]
        assert torch.allclose(trajectory.routing_confidence, predicting.mean(1), rtol=0, atol=1e-6)


def sample_of(*ids: int, version: int = 3, reason: str = "stop") -> Sample:
    return Sample(torch.tensor(ids), -torch.ones(len(ids)), reason, version, None, None)


@pytest.mark.parametrize(("limit", "turns", "reason"), [(6, 1, None), (5, 0, "length"), (4, 0, "length")])
def test_a_reply_that_leaves_no_token_to_generate_ends_the_trajectory(limit: int, turns: int, reason: str) -> None:
    """Two tokens and a reply of three: the limit has to leave room for a sixth."""
    episode = continued(Episode(letter_prompts(1)[0], 0), sample_of(4, AGAIN), AskAgain(), limit)
    assert (len(episode.replies), episode.cut, episode.over) == (turns, reason == "length", reason == "length")
    if not episode.over:
        request = next_request(episode, Sampling(1, limit, 1.0, 0))
        assert request.prompt_ids.tolist() == [4, 2, 4, AGAIN, *REPLY.tolist()]
        assert request.max_new_tokens == 1
    else:
        trajectory = assemble(episode, 0, letters())
        assert trajectory.finish_reason == "length"
        assert trajectory.turns == (Turn((0, 2), 3, "stop"),)
        assert trajectory.completion_ids.tolist() == [4, AGAIN]


def test_the_environment_is_asked_only_about_what_has_ended_by_itself() -> None:
    for reason in ("length", "loop", "abort"):
        episode = continued(Episode(letter_prompts(1)[0], 0), sample_of(4, AGAIN, reason=reason), AskAgain(), 99)
        assert episode.over
        assert assemble(episode, 0, letters()).finish_reason == reason


def test_a_trajectory_is_as_old_as_its_oldest_turn() -> None:
    episode = continued(Episode(letter_prompts(1)[0], 0), sample_of(4, AGAIN, version=7), AskAgain(), 99)
    trajectory = assemble(continued(episode, sample_of(3, DONE, version=9), AskAgain(), 99), 0, letters())
    assert trajectory.weight_version == 7
    assert [turn.weight_version for turn in trajectory.turns] == [7, 9]
    assert [turn.span for turn in trajectory.turns] == [(0, 2), (5, 7)]
