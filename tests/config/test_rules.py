"""Settings that contradict each other are refused before anything starts; the message names key and fix."""

import re

import pytest

from mispo.config.load import load_config
from mispo.config.rules import check_config
from mispo.config.schema import MispoConfig

FILE = ["recipe=paper", "data.path=d.jsonl"]
"""A run on the user's file: no generated task, no warm start."""


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.path=/some/where"], "model: set exactly one of model.preset and model.path; both are ('tiny' and"),
        (["data.task=null"], "data: set exactly one of data.task and data.path; neither is"),
        (["model.preset=null", "model.path=x/y"], "warm_start.steps: a checkpoint (model.path) needs no warm start"),
        ([*FILE, "model.mtp=1"], "model.mtp: a checkpoint (model.path) keeps the draft heads"),
        (["data=jsonl", "data.path=d.jsonl"], "warm_start.steps: traces exist for generated tasks only"),
        (["data.split=test"], "data.split: a generated task has no splits"),
        ([*FILE, "data.task_args={a: 1}"], "data.task_args: belong to data.task, which is not set"),
        ([*FILE, "reward=gym"], "reward.parts.task.name: gym scores reasoning-gym tasks, but data.task is not set"),
        (["data.mixture.a.path=x"], "data.mixture: replaces the source in data.task and data.path"),
        (["recipe=paper", "data.mixture.a.weight=2"], "data.mixture.a: set exactly one of data.mixture.a.task and"),
        (
            ["recipe=paper", "data.mixture.a.path=x", "data.mixture.a.task_args={a: 1}"],
            "data.mixture.a.task_args: belong to data.mixture.a.task",
        ),
        (
            ["recipe=paper", "data.mixture.a.path=x", "data.mixture.b.task=count_bits", "reward=gym"],
            "reward.parts.task.name: gym scores data.task, and data.mixture has none",
        ),
        (
            ["data.task=null", "data.mixture.a.task=count_bits", "reward=exact"],
            "warm_start.steps: traces exist for data.task, and data.mixture has none",
        ),
        (["eval.sets.a.samples=3"], "eval.sets.a: set exactly one of eval.sets.a.task and eval.sets.a.path"),
        (["eval.sets.a.task=count_bits"], "eval.sets.a.size: a generated task has no end; say how many problems"),
        (["reward.parts.mean.name=format"], "reward.parts.mean: the metric reward/mean exists already"),
        (["reward.parts.task.weight=-1"], "reward.parts.task.weight: must be at least 0 (is -1.0)"),
        (["reward.parts.task.weight=0"], "reward.parts: no part has a weight"),
        (["~reward.parts.task"], "reward.parts: no part has a weight"),
        (["trainer.actor_minibatches=257"], "trainer.actor_minibatches: must be at most the trajectories of a step, 2"),
        (["trainer.critic_minibatches=257"], "(rollout.prompts_per_step × rollout.samples_per_prompt; is 257)"),
        (["trainer.tokens_per_microbatch=100"], "must be at least the longest trajectory, 128 tokens"),
        (["critic.warmup_steps=16"], "critic.warmup_steps: must be less than trainer.steps, 16"),
        (["trainer.offload=optimizer"], "trainer.offload: optimizer needs trainer.zero_stage to be at least 1 (is 0)"),
        (["trainer.offload=parameters", "trainer.zero_stage=2"], "to be at least 3 (is 2)"),
        (["router.replay=rollout", "router.record=false"], "router.replay: rollout needs the experts of the rollout"),
        (["model.lora.rank=4", "router.freeze=true"], "router.freeze: with adapters (model.lora)"),
        (["model.lora.rank=4", "trainer.mtp_weight=0.1"], "trainer.mtp_weight: with adapters (model.lora)"),
    ],
)
def test_contradictions_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config(overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm=grpo", "rollout.samples_per_prompt=1"], "algorithm.advantage: group_std compares the samples"),
        (["algorithm=grpo", "algorithm.truncation=bootstrap"], "algorithm.truncation: bootstrap needs a critic"),
        (["algorithm=grpo", "critic=separate"], "critic: separate has no effect with algorithm/advantage=group_std"),
        (["algorithm/advantage=rloo"], "choose critic=none, or algorithm/advantage=gae"),
        (["critic=none"], "algorithm.advantage: gae needs a critic, but critic is none"),
        (["algorithm.overlong.share=0.2"], "algorithm.overlong.share: bootstrapping replaces the reward"),
        (
            ["algorithm/filter=quantile", "algorithm.mask_policy=current"],
            "alone, not quantile; choose algorithm/filter=bounds or token_only",
        ),
        (["critic=shared"], "trainer.critic_minibatches: must be trainer.actor_minibatches, 4, with critic=shared"),
        (
            ["critic=shared", "trainer.critic_minibatches=4", "router.replay=rollout"],
            "router.replay: values are never replayed, but critic=shared is on the actor's trunk",
        ),
    ],
)
def test_contradictions_of_a_method_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config(overrides)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["warm_start.mtp_weight=0.2"], "warm_start.mtp_weight"),
        (["model.lora.alpha=16"], "model.lora.alpha"),
        (["model.lora.targets=[q_proj]"], "model.lora.targets"),
        (["algorithm.reference=x"], "algorithm.reference"),
        (["algorithm.max_rounds=3"], "algorithm.max_rounds"),
        (["algorithm.overlong.penalty=2"], "algorithm.overlong.penalty"),
    ],
)
def test_a_setting_without_effect_is_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: has no effect with "):
        load_config(overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm/filter=token_only", "algorithm.mask_policy=current"],
        ["algorithm=grpo", "algorithm.kl=0.04", "algorithm.reference=x"],
        ["critic=shared", "trainer.critic_minibatches=4"],
        ["trainer.offload=parameters", "trainer.zero_stage=3"],
        ["recipe=paper", "data.mixture.a.path=x", "data.mixture.b.task=count_bits", "data.mixture.b.weight=2"],
        ["eval.sets.a.path=x", "eval.sets.b.task=count_bits", "eval.sets.b.size=5"],
        ["reward.parts.task.weight=0.9", "reward.parts.form.name=format", "reward.parts.form.weight=0.1"],
    ],
)
def test_what_fits_together_is_accepted(overrides: list[str]) -> None:
    load_config(overrides)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError) as problems:
        load_config(["rollout.temperature=-1", "trainer.zero_stage=9", "reward.workers=0", "critic=none"])
    assert len(str(problems.value).splitlines()) == 4


def test_the_defaults_are_sound_apart_from_the_data_that_a_user_has_to_name() -> None:
    with pytest.raises(ValueError, match=r"^data: set exactly one of data\.task and data\.path; neither is$"):
        check_config(MispoConfig())


def test_the_name_of_a_part_is_fixed_by_its_class() -> None:
    config = load_config([])
    config.algorithm.filter.name = "quantile"
    with pytest.raises(
        ValueError, match=r"^algorithm\.filter\.name: is fixed by the part; choose it with algorithm/fil"
    ):
        check_config(config)
