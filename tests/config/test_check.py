"""Nonsense is refused before anything starts; the message names the key."""

import re

import pytest

from mispo.config.check import AT_LEAST, CHOICES, POSITIVE, SHARES, check_config, value_of
from mispo.config.load import load_config
from mispo.config.objective import objective
from mispo.config.schema import MispoConfig


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.samples_per_prompt=0"], "rollout.samples_per_prompt: 0 is no number from 1 on"),
        (["rollout.temperature=0"], "rollout.temperature: 0.0 is no positive number"),
        (["trainer.max_grad_norm=-1"], "trainer.max_grad_norm: -1.0 is no positive number"),
        (["warm_start.terse_fraction=1.5"], "warm_start.terse_fraction: 1.5 is not between 0 and 1"),
        (["alarms.max_low_confidence=2"], "alarms.max_low_confidence: 2.0 is not between 0 and 1"),
        (["alarms.min_agreement=-1"], "alarms.min_agreement: -1.0 is not between 0 and 1"),
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
        (["model.mtp=4"], "model.mtp: '4' is none of 0, 1, 2, 3"),
        (["model.preset=null", "model.path=x/y", "model.mtp=1"], "model.mtp: a checkpoint (model.path) has the draft"),
        (["warm_start.mtp_weight=0.2"], "warm_start.mtp_weight: nobody reads it while model.mtp=0"),
        (["model.mtp=3", "warm_start.mtp_weight=-1"], "warm_start.mtp_weight: -1.0 is no number from 0 on"),
        (["model.preset=null", "model.path=x/y"], "warm_start.steps: a checkpoint (model.path) needs no warm start"),
        (["trainer.actor_lr=nan"], "trainer.actor_lr: nan is no number from 0 on"),
        (["trainer.actor_lr=inf"], "trainer.actor_lr: inf is no number from 0 on"),
        (
            ["critic.kind=shared"],
            "trainer.critic_minibatches: 12, but a shared critic (critic.kind) learns in the actor",
        ),
        (["critic.kind=shared", "critic.warmup_steps=1"], "critic.warmup_steps: a shared critic (critic.kind) cannot"),
        (["critic.kind=shared", "critic.model=x/y"], "critic.model: nobody reads it while critic.kind=shared"),
        (["model.lora.alpha=16"], "model.lora: nobody reads alpha and targets while model.lora.rank=0"),
        (["critic.loss_weight=1"], "critic.loss_weight: nobody reads it while critic.kind=separate"),
        (["trainer.optimizer=muon", "trainer.max_grad_norm=2"], "trainer.max_grad_norm: nobody reads it while"),
        (["trainer.optimizer=adam"], "trainer.optimizer: 'adam' is none of muon, adamw; did you mean adamw?"),
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


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm=grpo", "rollout.samples_per_prompt=1"], "algorithm.advantage: group_std compares the samples"),
        (["algorithm=grpo", "algorithm.truncation=bootstrap"], "algorithm.truncation: bootstrap asks a critic"),
        (["algorithm=grpo", "algorithm.lam=0.9"], "algorithm.lam: nobody reads it while algorithm.advantage=group_std"),
        (["algorithm=grpo", "critic.warmup_steps=2"], "critic.warmup_steps: nobody reads it"),
        (["algorithm.clip=[0.1,0.1]"], "algorithm.clip: nobody reads it while algorithm.loss=mispo"),
        (["algorithm.filter.target_steps=9"], "leave it out, or set algorithm.filter.name=quantile"),
        (["algorithm.overlong.share=0.2"], "algorithm.overlong.share: bootstrapping replaces the reward"),
        (
            ["algorithm=mispo_quantile", "algorithm.mask_policy=current"],
            "mask_policy: current needs a filter",
        ),
        (["algorithm=ppo", "algorithm.clip=[0.2]"], "algorithm.clip: give two numbers"),
        (["algorithm=ppo", "algorithm.dual_clip=0.5"], "algorithm.dual_clip: 0.5 is not above 1"),
        (["algorithm=tis", "algorithm.correction_cap=nan"], "algorithm.correction_cap: nan is no positive number"),
        (["algorithm=icepop", "algorithm.correction_bounds=[2,0.5]"], "algorithm.correction_bounds: [2.0, 0.5] is no"),
        (["algorithm.reference=x"], "algorithm.reference: nobody reads it while algorithm.kl=0"),
        (["algorithm.gamma=1.5"], "algorithm.gamma: 1.5 is not in (0, 1]"),
        (["algorithm.filter.token_bounds=[nan,2]"], "algorithm.filter.token_bounds: [nan, 2.0] is no range"),
        (["critic.value_clip=-1"], "critic.value_clip: -1.0 is no positive number"),
    ],
)
def test_contradictions_of_a_method_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config(overrides)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mispo", "L = −1/N Σ_τ Σ_t 1[0.5 ≤ x ≤ 2]·1[0.996 ≤ ρ̄ ≤ 1.001]·Â·log π_θ,  Â = whiten(GAE(γ=1, λ=1))"),
        ("ppo", "L = −1/N Σ_τ Σ_t max(min(r·Â, clip(r, 0.8, 1.2)·Â), −3·|Â|)"),
        ("tis", "min(x, 2)·max("),
        ("icepop", "x·1[0.5 ≤ x ≤ 5]·max("),
        ("grpo", "L = −1/B Σ_τ 1/T Σ_t min(r·Â, clip(r, 0.8, 1.2)·Â),  Â = (R̂ − mean_group)/std_group"),
        ("dr_grpo", "L = −1/(B·T_max) Σ_τ Σ_t min("),
        ("dapo", "clip(r, 0.8, 1.28)·Â),  Â = (R̂ − mean_group)/std_group,  R̂ = R − overlong, 0 − overlong if cut"),
        ("gspo", "min(s·Â, clip(s, 0.9997, 1.0004)·Â)"),
        ("cispo", "sg[clip(r, 0, 5)]·Â·log π_θ"),
        ("mispo_quantile", "1[|log ρ̄| ≤ b_k]"),
        ("mispo_metropolis", "multiplicity(w = ∏x)·Â·log π_θ"),
        ("random_reject", "1[random, as many as 0.996 ≤ ρ̄ ≤ 1.001]"),
        ("token_only", "Σ_t 1[0.5 ≤ x ≤ 2]·Â·log π_θ"),
    ],
)
def test_the_objective_of_every_method_in_one_line(name: str, words: str) -> None:
    assert words in objective(load_config([f"algorithm={name}"]))
