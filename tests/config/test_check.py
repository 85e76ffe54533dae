"""Nonsense is refused before anything starts; the message names the key."""

import re

import pytest

from mispo.config.check import AT_LEAST, CHOICES, POSITIVE, SHARES, check_config, value_of
from mispo.config.load import load_config
from mispo.config.schema import MispoConfig


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.samples_per_prompt=0"], "rollout.samples_per_prompt: 0 is no number from 1 on"),
        (["rollout.temperature=0"], "rollout.temperature: 0.0 is no positive number"),
        (["trainer.max_grad_norm=-1"], "trainer.max_grad_norm: -1.0 is no positive number"),
        (["warm_start.terse_fraction=1.5"], "warm_start.terse_fraction: 1.5 is not between 0 and 1"),
        (["algorithm.gamma=0"], "algorithm.gamma: 0.0 is not in (0, 1]"),
        (["trainer.zero_stage=4"], "trainer.zero_stage: 4 is none of 0, 1, 2, 3"),
        (["algorithm.truncation=boostrap"], "did you mean bootstrap?"),
        (["algorithm.filter.token_bounds=[2,0.5]"], "algorithm.filter.token_bounds: [2.0, 0.5] is no range"),
        (["algorithm.filter.token_bounds=[0.5]"], "give two numbers [low, high]"),
        (["algorithm.filter.trajectory_bounds=[1.1,2]"], "rejects samples on which both policies agree"),
        (["algorithm.filter.trajectory_bounds=[0.9,inf]"], "is no range"),
        (["model.path=/some/where"], "both are ('tiny' and '/some/where')"),
        (["data.task=null"], "neither is"),
        (["trainer.actor_minibatches=257"], "trainer.actor_minibatches: 257 parts, but a step has only 256"),
        (["trainer.tokens_per_microbatch=100"], "trainer.tokens_per_microbatch: 100 is less than the longest"),
        (["data=jsonl", "data.path=d.jsonl", "data.task=null", "data.task_args=null"], "data.task_args"),
        (["critic.warmup_steps=16"], "the actor would never move"),
        (["data.split=test"], "data.split: a generated task has no splits"),
        (["model.preset=null", "model.path=x/y"], "warm_start.steps: a checkpoint (model.path) needs no warm start"),
        (["trainer.actor_lr=nan"], "trainer.actor_lr: nan is no number from 0 on"),
        (["trainer.actor_lr=inf"], "trainer.actor_lr: inf is no number from 0 on"),
        (["rollout.temperature=inf"], "rollout.temperature: inf is no positive number"),
    ],
)
def test_nonsense_is_named(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config(overrides)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError) as problems:
        load_config(["rollout.temperature=-1", "trainer.zero_stage=9", "reward.workers=0"])
    assert len(str(problems.value).splitlines()) == 3


def test_the_defaults_are_sound_apart_from_the_data_that_a_user_has_to_name() -> None:
    with pytest.raises(ValueError, match=r"^data: set exactly one of data\.task and data\.path; neither is"):
        check_config(MispoConfig())


def test_every_checked_key_exists() -> None:
    for key in (*CHOICES, *AT_LEAST, *POSITIVE, *SHARES):
        value_of(MispoConfig(), key)
