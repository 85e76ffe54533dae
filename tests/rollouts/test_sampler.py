"""Steps of trajectories: grading meanwhile, dynamic sampling on one rank and two, stopping, weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from mispo.trainer.ranks import Ranks
from rollouts.environments.single_turn import SingleTurn
from rollouts.episodes import Sampling, request_seed
from rollouts.grading import Grader, Item, grade
from rollouts.native.engine import NativeEngine
from rollouts.sampler import Peers, StepSettings, SynchronousSampler, Taken, Weights
from rollouts.trajectory import Prompt, Trajectory
from support.engines import EchoEngine
from support.tiny_models import tiny_model
from support.trajectories import letter_prompts, letters, made_trajectory

T = TypeVar("T")

STEP = StepSettings(
    prompts_per_step=3,
    sampling=Sampling(samples_per_prompt=4, max_new_tokens=7, temperature=0.5, seed=5),
    permute=False,
    max_rounds=None,
    parity_tolerance=0.1,
)


@dataclass
class LevelGrader:
    """Scores an item with what `judge` says about it; the newest one first, one per call."""

    judge: Callable[[Item], float]
    log: list[str] = field(default_factory=list)
    items: list[tuple[int, Item]] = field(default_factory=list)
    received: list[Item] = field(default_factory=list)
    closed: bool = False

    def submit(self, ticket: int, item: Item) -> None:
        self.received.append(item)
        self.items.append((ticket, item))

    def finished(self, timeout_s: float = 0.0) -> list[tuple[int, Any]]:
        if not self.items:
            return []
        ticket, item = self.items.pop()
        self.log.append("score" if timeout_s == 0 else "waited")
        return [(ticket, self._score(item))]

    def score(self, items: Sequence[Item]) -> list[Any]:
        self.received += items
        return [self._score(item) for item in items]

    def _score(self, item: Item) -> Any:
        value = self.judge(item)
        return SimpleNamespace(value=value, info={"outcome": "ok"}, parts={"task": value, "form": 1.0})

    def close(self) -> None:
        self.closed = True


class Prompts:
    """letter_prompts one after the other."""

    def __init__(self) -> None:
        self.cursor = 0

    def take(self, count: int) -> list[Prompt]:
        self.cursor += count
        return letter_prompts(self.cursor)[-count:]


def alone() -> Ranks:
    return Ranks(0, 1, torch.device("cpu"))


def by_length(item: Item) -> float:
    return float(len(item["completion"]))


def sampler_of(
    grader: Grader,
    settings: StepSettings = STEP,
    *,
    engine: Any = None,
    peers: Peers | None = None,
    asked: Callable[[], bool] = lambda: False,
    phases: list[str] | None = None,
) -> SynchronousSampler:
    @contextmanager
    def clock(phase: str) -> Iterator[None]:
        if phases is not None:
            phases.append(phase)
        yield

    return SynchronousSampler(
        engine=EchoEngine() if engine is None else engine,
        environment=SingleTurn(),
        prompts=Prompts().take,
        grader=grader,
        tokenizer=letters(),
        settings=settings,
        peers=alone() if peers is None else peers,
        asked=asked,
        clock=clock,
    )


def places(taken: Taken) -> list[tuple[int, int]]:
    return [(t.prompt.index, t.sample) for t in taken.trajectories]


def test_a_step_is_whole_prompts_in_order_each_with_its_score() -> None:
    """Although the engine and the grader both begin with the last one."""
    grader, phases = LevelGrader(by_length), []
    sampler = sampler_of(grader, phases=phases)
    taken = sampler.take(1)
    assert places(taken) == [(10 + p, s) for p in range(3) for s in range(4)]
    assert taken.metrics == {}
    assert phases == ["rollout", "reward"]
    for trajectory in taken.trajectories:
        assert trajectory.seed == request_seed(5, trajectory.prompt.index, trajectory.sample)
        assert trajectory.reward == len(trajectory.completion)
        assert trajectory.reward_parts == {"task": trajectory.reward, "form": 1.0}
        assert trajectory.reward_info == {"outcome": "ok"}
    assert {t.reward for t in taken.trajectories} == {2.0, 7.0}
    assert [t.prompt.index for t in sampler.take(2).trajectories][::4] == [13, 14, 15]
    item = grader.received[11]
    assert item == {
        "prompt": "question 0",
        "completion": taken.trajectories[0].completion,
        "answer": "answer 0",
        "row": {"level": 0},
    }
    sampler.close()
    assert grader.closed


def test_what_has_ended_is_graded_while_the_others_are_sampled() -> None:
    log: list[str] = []
    sampler_of(LevelGrader(by_length, log), engine=EchoEngine(log)).take(1)
    assert log == ["engine", "score"] * 12


def test_the_last_scores_are_waited_for() -> None:
    log: list[str] = []

    class AllAtOnce(NativeEngine):
        def finished(self) -> list[Any]:
            log.append("engine")
            ended = super().finished()
            while len(ended) < 12:
                ended += super().finished()
            return ended

    engine = AllAtOnce(tiny_model("llama"), (1, 2), 0, 12)
    taken = sampler_of(LevelGrader(by_length, log), engine=engine).take(1)
    assert log == ["engine", "score"] + ["waited"] * 11
    assert places(taken) == [(10 + p, s) for p in range(3) for s in range(4)]


def test_grading_a_list_keeps_the_order() -> None:
    trajectories = [made_trajectory(n, completion="x" * n) for n in range(4)]
    graded = grade(trajectories, LevelGrader(by_length))
    assert [t.reward for t in graded] == [0.0, 1.0, 2.0, 3.0]
    assert all(t.reward != t.reward for t in trajectories)


def test_permuted_rewards_are_the_same_rewards_elsewhere() -> None:
    plain = sampler_of(LevelGrader(by_length)).take(1).trajectories
    settings = replace(STEP, permute=True)
    first, second = (sampler_of(LevelGrader(by_length), settings).take(step).trajectories for step in (1, 2))
    rewards = [t.reward for t in plain]
    random.Random(5 * 1_000_003 + 1).shuffle(rewards)
    assert [t.reward for t in first] == rewards != [t.reward for t in plain]
    assert [t.reward for t in second] != rewards
    assert [replace(t, reward=0.0).reward_parts for t in first] == [t.reward_parts for t in plain]


def alike_every_third(item: Item) -> float:
    """Samples of the prompts 0, 3, 6, … all get the same reward."""
    level = item["row"]["level"]
    assert isinstance(level, int)
    return 0.5 if level % 3 == 0 else float(len(item["completion"]))


@pytest.mark.parametrize(
    ("rounds", "prompts", "metrics"),
    [
        (1, [11, 12, 10], {"rollout/rounds": 1.0, "rollout/filled": 1 / 3}),
        (2, [11, 12, 10], {"rollout/rounds": 2.0, "rollout/filled": 1 / 3}),
        (9, [11, 12, 14], {"rollout/rounds": 3.0, "rollout/filled": 0.0}),
    ],
)
def test_prompts_that_teach_nothing_are_replaced(rounds: int, prompts: list[int], metrics: dict[str, float]) -> None:
    """10, 13, 16, … teach nothing: the second round takes 13, the third 14."""
    settings = replace(STEP, max_rounds=rounds)
    phases: list[str] = []
    taken = sampler_of(LevelGrader(alike_every_third), settings, phases=phases).take(1)
    assert [t.prompt.index for t in taken.trajectories][::4] == prompts
    assert taken.metrics == pytest.approx(metrics)
    assert phases == ["rollout", "reward"] * int(metrics["rollout/rounds"])


class InThreads:
    """`Peers` of two threads."""

    barrier, box = Barrier(2, timeout=60), [[], []]

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def share(self, count: int) -> range:
        return Ranks(self.rank, 2, torch.device("cpu")).share(count)

    def concatenate(self, items: list[T]) -> list[T]:
        self.box[self.rank] = items
        self.barrier.wait()
        joined = [item for part in self.box for item in part]
        self.barrier.wait()
        return joined

    def any(self, flag: bool) -> bool:
        return any(self.concatenate([flag]))


@pytest.mark.parametrize("rounds", [None, 1, 9])
def test_two_ranks_take_together_what_one_takes(rounds: int | None) -> None:
    settings = replace(STEP, prompts_per_step=5, max_rounds=rounds)
    expected = sampler_of(LevelGrader(alike_every_third), settings).take(1)
    found: dict[int, Taken] = {}

    def rank(number: int) -> None:
        sampler = sampler_of(LevelGrader(alike_every_third), settings, peers=InThreads(number))
        found[number] = sampler.take(1)

    threads = [Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(found[number].trajectories) for number in range(2)] == [8, 12]
    assert places(found[0]) + places(found[1]) == places(expected)
    rewards = [t.reward for number in range(2) for t in found[number].trajectories]
    assert rewards == [t.reward for t in expected.trajectories]
    assert found[0].metrics == found[1].metrics == expected.metrics


def test_a_stop_ends_sampling_with_the_prompts_that_are_whole() -> None:
    """After six looks: the newest request ends first, so prompt 12 is whole, and half of prompt 11."""
    engine, looks = EchoEngine(), iter([False] * 6)
    sampler = sampler_of(LevelGrader(by_length), engine=engine, asked=lambda: next(looks, True))
    taken = sampler.take(1)
    assert places(taken) == [(12, s) for s in range(4)]
    assert sorted(engine.cancelled) == [1, 2, 3, 4, 5, 6]


def test_a_stop_ends_waiting_for_scores_and_further_rounds() -> None:
    class Mute(LevelGrader):
        """Keeps six items to itself: those that came first, of the prompts 12 and 11."""

        def finished(self, timeout_s: float = 0.0) -> list[tuple[int, Any]]:
            return super().finished() if len(self.items) > 6 else []

    asked = iter([False] * 30)
    settings = replace(STEP, max_rounds=9)
    engine, grader = EchoEngine(), Mute(by_length)
    sampler = sampler_of(grader, settings, engine=engine, asked=lambda: next(asked, True))
    taken = sampler.take(1)
    assert len(engine.requests) == 12
    assert places(taken) == [(10, s) for s in range(4)]
    assert taken.metrics["rollout/rounds"] == 1.0


def test_scores_of_a_step_that_was_stopped_are_ignored() -> None:
    """They come while the next step is graded."""
    grader, stop = LevelGrader(by_length), iter([False, False, True, True])
    sampler = sampler_of(grader, asked=lambda: next(stop, False))
    grader.finished, kept = (lambda timeout_s=0.0: []), grader.finished  # type: ignore[method-assign]
    assert sampler.take(1).trajectories == []
    assert len(grader.items) == 2
    grader.finished = kept  # type: ignore[method-assign]
    taken = sampler.take(2)
    assert places(taken) == [(13 + p, s) for p in range(3) for s in range(4)]
    assert all(t.reward == len(t.completion) for t in taken.trajectories)


def test_weights_are_loaded_and_proved() -> None:
    engine = EchoEngine()
    sampler = sampler_of(LevelGrader(by_length), engine=engine)
    probe = [(torch.tensor([3]), torch.tensor([4, 5])), (torch.tensor([3]), torch.tensor([4, 5]))]
    weights = Weights(11, {}, probe, [torch.zeros(2), torch.zeros(2)])
    engine.gap = 0.125
    assert sampler.publish(weights) == {"sync/mean_abs": 0.0625, "sync/max_abs": 0.125}
    assert engine.weight_version == 11
    for gap in (0.5, float("nan")):
        engine.gap = gap
        with pytest.raises(
            RuntimeError, match=r"weight sync: engine and trainer differ by .*, rollout\.parity_tolerance 0\.1"
        ):
            sampler.publish(weights)


def test_the_native_engine_gives_the_same_steps_again() -> None:
    def step() -> list[Trajectory]:
        engine = NativeEngine(tiny_model("step"), (1, 2), 0, 5)
        return sampler_of(LevelGrader(by_length), engine=engine).take(1).trajectories

    for one, other in zip(step(), step(), strict=True):
        assert torch.equal(one.completion_ids, other.completion_ids)
        assert torch.equal(one.rollout_logprobs, other.rollout_logprobs)
