"""From prompts to trajectories: requests, the environment's replies, and what becomes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rollouts.engine import Engine, Request, Sample
from rollouts.environment import Environment
from rollouts.trajectory import Prompt, Trajectory, Turn


@dataclass(frozen=True)
class Sampling:
    """How prompts are sampled.

    samples_per_prompt: ≥ 1. max_new_tokens: of a whole trajectory, replies of the environment included.
    temperature: > 0 for training, 0 for greedy evaluation. seed: the run's seed; with the prompt's index and the
    sample's number it fixes a request's random numbers, so that a run can be repeated or resumed.
    """

    samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    seed: int

    def __post_init__(self) -> None:
        if self.samples_per_prompt < 1:
            raise ValueError(f"rollout.samples_per_prompt must be at least 1 (is {self.samples_per_prompt})")


@dataclass(frozen=True)
class Episode:
    """A trajectory that is under way.

    prompt: with the ids that the environment has given. number: which attempt at it. samples: of the turns so far.
    replies: of the environment; one after each sample while the episode goes on. cut: whether a reply did not fit.
    """

    prompt: Prompt
    number: int
    samples: tuple[Sample, ...] = ()
    replies: tuple[Tensor, ...] = ()
    cut: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more is to be sampled."""
        return len(self.samples) > len(self.replies)

    @property
    def parts(self) -> list[tuple[Tensor, Sample | None]]:
        """Token ids of the completion so far, part by part, with the sample that they come from; None for a reply."""
        found: list[tuple[Tensor, Sample | None]] = []
        for turn, sample in enumerate(self.samples):
            found.append((sample.completion_ids, sample))
            found += [(reply, None) for reply in self.replies[turn : turn + 1]]
        return found


def play(
    engine: Engine,
    environment: Environment,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    asked: Callable[[], bool] = lambda: False,
) -> Iterator[list[tuple[int, Trajectory]]]:
    """Sample trajectories and yield (place, trajectory), not yet graded, as they end; sometimes an empty list.

    place: all attempts at the first prompt, then at the second, … asked: whether to stop early; then what is still
    being sampled is cancelled, as it is if the caller does not go on.
    """
    running: dict[int, tuple[int, Episode]] = {}
    opened = [replace(prompt, ids=environment.start(prompt)) for prompt in prompts]
    episodes = [Episode(prompt, number) for prompt in opened for number in range(sampling.samples_per_prompt)]
    try:
        for place, episode in enumerate(episodes):
            running[engine.submit(next_request(episode, sampling))] = place, episode
        while running and not asked():
            ended = []
            for ticket, sample in engine.finished():
                place, episode = running.pop(ticket)
                episode = continued(episode, sample, environment, sampling.max_new_tokens)
                if episode.over:
                    ended.append((place, assemble(episode, sampling.seed, tokenizer)))
                else:
                    running[engine.submit(next_request(episode, sampling))] = place, episode
            yield ended
    finally:
        engine.cancel(running)


def play_all(
    engine: Engine,
    environment: Environment,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
) -> list[Trajectory]:
    """Sample all attempts at the first prompt, then at the second, …; not graded."""
    ended = dict(pair for pairs in play(engine, environment, tokenizer, prompts, sampling) for pair in pairs)
    return [ended[place] for place in range(len(ended))]


def next_request(episode: Episode, sampling: Sampling) -> Request:
    """Make the request of the next turn: it goes on from everything so far, with what is left of the token limit."""
    parts = [ids for ids, _ in episode.parts]
    return Request(
        prompt_ids=torch.cat([episode.prompt.ids, *parts]),
        seed=request_seed(sampling.seed, episode.prompt.index, episode.number, len(episode.samples)),
        max_new_tokens=sampling.max_new_tokens - sum(map(len, parts)),
        temperature=sampling.temperature,
    )


def continued(episode: Episode, sample: Sample, environment: Environment, limit: int) -> Episode:
    """Return the episode after one more sample, with the environment's reply to it.

    limit: tokens of the whole completion. A reply that leaves none to generate ends the episode, and is left out.
    """
    episode = replace(episode, samples=(*episode.samples, sample))
    reply = environment.reply(sample) if sample.finish_reason == "stop" else None
    if reply is None:
        return episode
    if sum(len(ids) for ids, _ in episode.parts) + len(reply) >= limit:
        return replace(episode, cut=True)
    return replace(episode, replies=(*episode.replies, reply))


def request_seed(run_seed: int, prompt_index: int, sample: int, turn: int = 0) -> int:
    """Hash to 63 bits, the same on every machine and in every process. turn: of a trajectory, 0 is the first."""
    text = f"{run_seed}:{prompt_index}:{sample}" + (f":{turn}" if turn else "")
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def assemble(episode: Episode, run_seed: int, tokenizer: PreTrainedTokenizerBase) -> Trajectory:
    """Make the trajectory of an episode that is over; not graded."""
    last = episode.samples[-1]
    ids = torch.cat([ids for ids, _ in episode.parts])
    wrote = [torch.full((len(ids),), sample is not None) for ids, sample in episode.parts]
    logprobs = [torch.zeros(len(ids)) if sample is None else sample.logprobs for ids, sample in episode.parts]
    shown = ids[:-1] if last.finish_reason == "stop" else ids
    text = tokenizer.decode(shown.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return Trajectory(
        prompt=episode.prompt,
        sample=episode.number,
        seed=request_seed(run_seed, episode.prompt.index, episode.number),
        completion_ids=ids,
        action_mask=torch.cat(wrote),
        rollout_logprobs=torch.cat(logprobs),
        turns=turns_of(episode),
        finish_reason="length" if episode.cut else last.finish_reason,
        weight_version=min(sample.weight_version for sample in episode.samples),
        routing_confidence=mean_confidence(episode.samples),
        routed_experts=joined_experts(episode.samples),
        completion=text,
    )


def turns_of(episode: Episode) -> tuple[Turn, ...]:
    """Say which tokens of the completion each sample has given."""
    turns, start = [], 0
    for ids, sample in episode.parts:
        if sample is not None:
            turns.append(Turn((start, start + len(ids)), sample.weight_version, sample.finish_reason))
        start += len(ids)
    return tuple(turns)


def mean_confidence(samples: Sequence[Sample]) -> Tensor | None:
    """Average routing confidence over the generated tokens of all turns, [MoE layers]; None for a dense model."""
    known = [sample.routing_confidence for sample in samples if sample.routing_confidence is not None]
    if len(known) < len(samples):
        return None
    if len(known) == 1:
        return known[0]
    counts = torch.tensor([len(sample.completion_ids) for sample in samples], dtype=torch.float64)
    return (torch.stack(known).T.double() @ counts / counts.sum()).float()


def joined_experts(samples: Sequence[Sample]) -> Tensor | None:
    """Join the experts of all turns, [P+T−1, MoE layers, k]; None where they were not recorded.

    Each turn's forward goes over all positions before it once more; those of the turn that generated them count.
    """
    joined: Tensor | None = None
    for sample in samples:
        if sample.routed_experts is None:
            return None
        done = 0 if joined is None else len(joined)
        joined = sample.routed_experts if joined is None else torch.cat([joined, sample.routed_experts[done:]])
    return joined
