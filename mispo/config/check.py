"""What a config must not say. Every message names the key and the fix; all problems are told at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from mispo.config.schema import LoraConfig, MispoConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "model.mtp": ("0", "1", "2", "3"),
    "model.attention": ("sdpa", "eager", "flex_attention", "flash_attention_2"),
    "rollout.dtype": ("auto", "fp32", "bf16", "fp16"),
    "trainer.dtype": ("auto", "fp32", "bf16"),
    "trainer.optimizer": ("muon", "adamw"),
    "trainer.layout": ("auto", "padded", "packed"),
    "trainer.offload": ("none", "optimizer", "parameters"),
    "algorithm.filter.name": ("bounds", "quantile", "metropolis", "random", "token_only", "none"),
    "algorithm.filter.ratio": ("trajectory", "mean"),
    "algorithm.mask_policy": ("old", "current"),
    "algorithm.loss": ("mispo", "ppo", "gspo", "cispo"),
    "algorithm.correction": ("none", "tis", "icepop"),
    "algorithm.advantage": ("gae", "group_std", "group_mean", "rloo"),
    "algorithm.whiten": ("batch", "none"),
    "algorithm.truncation": ("bootstrap", "zero", "mask"),
    "algorithm.loss_norm": ("tokens", "accepted", "sequence", "constant"),
    "critic.kind": ("separate", "shared"),
    "router.replay": ("off", "rollout", "old"),
    "alarms.action": ("warn", "stop", "off"),
    "tracking.wandb": ("auto", "online", "offline", "disabled"),
}

AT_LEAST: dict[str, float] = {
    "data.max_prompt_tokens": 1,
    "data.eval_size": 0,
    "model.lora.rank": 0,
    "warm_start.steps": 0,
    "warm_start.batch_size": 1,
    "warm_start.warmup_steps": 0,
    "warm_start.mtp_weight": 0,
    "reward.workers": 1,
    "rollout.prompts_per_step": 1,
    "rollout.samples_per_prompt": 1,
    "rollout.max_new_tokens": 1,
    "rollout.slots": 1,
    "rollout.staleness": 0,
    "algorithm.filter.target_steps": 0,
    "algorithm.kl": 0,
    "algorithm.entropy": 0,
    "algorithm.max_rounds": 1,
    "algorithm.overlong.penalty": 0,
    "alarms.patience": 1,
    "critic.pretrain_steps": 0,
    "critic.warmup_steps": 0,
    "critic.head_init_std": 0,
    "router.bias_update_rate": 0,
    "router.attribute_every": 0,
    "router.attribute_trajectories": 2,
    "trainer.steps": 0,
    "trainer.actor_minibatches": 1,
    "trainer.critic_minibatches": 1,
    "trainer.tokens_per_microbatch": 1,
    "trainer.actor_lr": 0,
    "trainer.critic_lr": 0,
    "trainer.actor_warmup_updates": 0,
    "trainer.critic_warmup_updates": 0,
    "trainer.mtp_weight": 0,
    "trainer.weight_decay": 0,
    "trainer.max_skipped_updates": 1,
    "eval.every": 0,
    "eval.samples": 0,
    "eval.traces": 0,
    "checkpoint.every": 0,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 0,
    "tracking.rollouts_every": 0,
}

POSITIVE = (
    "model.lora.alpha",
    "warm_start.lr",
    "reward.timeout_s",
    "rollout.temperature",
    "rollout.parity_tolerance",
    "alarms.max_mismatch",
    "alarms.stall_s",
    "trainer.max_grad_norm",
    "critic.loss_weight",
)

SHARES = (
    "warm_start.terse_fraction",
    "reward.format_weight",
    "algorithm.lam",
    "algorithm.overlong.share",
    "alarms.min_acceptance",
    "alarms.max_low_confidence",
    "alarms.min_agreement",
    "alarms.max_failed_rewards",
    "critic.lam",
)

BELONGS: dict[str, tuple[str, tuple[object, ...]]] = {
    "warm_start.mtp_weight": ("model.mtp", (1, 2, 3)),
    "algorithm.filter.token_bounds": ("algorithm.filter.name", ("bounds", "quantile", "random", "token_only")),
    "algorithm.filter.trajectory_bounds": ("algorithm.filter.name", ("bounds", "random")),
    "algorithm.filter.target_acceptance": ("algorithm.filter.name", ("quantile",)),
    "algorithm.filter.target_steps": ("algorithm.filter.name", ("quantile",)),
    "algorithm.filter.by_length": ("algorithm.filter.name", ("quantile",)),
    "algorithm.filter.ratio": ("algorithm.filter.name", ("metropolis",)),
    "algorithm.clip": ("algorithm.loss", ("ppo", "gspo", "cispo")),
    "algorithm.dual_clip": ("algorithm.loss", ("ppo",)),
    "algorithm.correction_cap": ("algorithm.correction", ("tis",)),
    "algorithm.correction_bounds": ("algorithm.correction", ("icepop",)),
    "algorithm.max_rounds": ("algorithm.dynamic_sampling", (True,)),
    "trainer.max_grad_norm": ("trainer.optimizer", ("adamw",)),
    "algorithm.gamma": ("algorithm.advantage", ("gae",)),
    "algorithm.lam": ("algorithm.advantage", ("gae",)),
    "critic.lam": ("algorithm.advantage", ("gae",)),
    "critic.kind": ("algorithm.advantage", ("gae",)),
    "critic.model": ("algorithm.advantage", ("gae",)),
    "critic.loss_weight": ("critic.kind", ("shared",)),
    "critic.pretrain_steps": ("algorithm.advantage", ("gae",)),
    "critic.warmup_steps": ("algorithm.advantage", ("gae",)),
    "critic.value_clip": ("algorithm.advantage", ("gae",)),
    "critic.train_on_truncated": ("algorithm.advantage", ("gae",)),
}
"""Key → (the key that decides whether it is read, at which values). Set without being read, it is an error."""


def check_config(config: MispoConfig) -> None:
    """ValueError with one line per problem."""
    problems = list(_problems(config))
    if problems:
        raise ValueError("\n".join(problems))


def value_of(config: MispoConfig, key: str) -> object:
    """The value at a dotted key."""
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _number(config: MispoConfig, key: str) -> float:
    value = value_of(config, key)
    assert isinstance(value, int | float)
    return float(value)


def _problems(config: MispoConfig) -> Iterator[str]:
    for key, choices in CHOICES.items():
        value = str(value_of(config, key))
        if value not in choices:
            near = get_close_matches(value, choices, 1)
            if value == "False" and "off" in choices:
                yield f"{key}: YAML reads a bare off as false; write 'off', with its quotes"
                continue
            yield f"{key}: {value!r} is none of {', '.join(choices)}{f'; did you mean {near[0]}?' if near else ''}"
    for key, least in AT_LEAST.items():
        if not least <= _number(config, key) < math.inf:
            yield f"{key}: {value_of(config, key)} is no number from {least:g} on"
    for key in POSITIVE:
        if not 0 < _number(config, key) < math.inf:
            yield f"{key}: {value_of(config, key)} is no positive number"
    for key in SHARES:
        if not 0 <= _number(config, key) <= 1:
            yield f"{key}: {value_of(config, key)} is not between 0 and 1"
    if not 0 < config.algorithm.gamma <= 1:
        yield f"algorithm.gamma: {config.algorithm.gamma} is not in (0, 1]"
    if config.trainer.zero_stage not in (0, 1, 2, 3):
        yield f"trainer.zero_stage: {config.trainer.zero_stage} is none of 0, 1, 2, 3"
    least = {"optimizer": 1, "parameters": 3}.get(config.trainer.offload, 0)
    if config.trainer.zero_stage < least:
        yield (
            f"trainer.offload: {config.trainer.offload} needs trainer.zero_stage of {least} or more, not "
            f"{config.trainer.zero_stage}"
        )
    for name in ("token_bounds", "trajectory_bounds"):
        yield from _bounds(f"algorithm.filter.{name}", getattr(config.algorithm.filter, name))
    yield from _bounds("algorithm.correction_bounds", config.algorithm.correction_bounds)
    target = config.algorithm.filter.target_acceptance
    if len(target) != 2 or not all(0 <= share <= 1 for share in target):
        yield f"algorithm.filter.target_acceptance: give two shares [first, last] in [0, 1], not {list(target)}"
    yield from _sources(config)
    yield from _inert(config)
    yield from _method(config)
    yield from _shared_critic(config)
    yield from _router(config)
    yield from _contradictions(config)


def _shared_critic(config: MispoConfig) -> Iterator[str]:
    """One joint loss uses each sample once, and moves the policy with every update."""
    critic, trainer = config.critic, config.trainer
    if critic.kind != "shared" or config.algorithm.advantage != "gae":
        return
    if critic.model is not None:
        yield "critic.model: nobody reads it while critic.kind=shared; leave it out, or set critic.kind=separate"
    if trainer.critic_minibatches != trainer.actor_minibatches:
        yield (
            f"trainer.critic_minibatches: {trainer.critic_minibatches}, but a shared critic (critic.kind) learns in "
            f"the actor's updates; set it to trainer.actor_minibatches, {trainer.actor_minibatches}"
        )
    for name in ("pretrain_steps", "warmup_steps"):
        if getattr(critic, name):
            yield f"critic.{name}: a shared critic (critic.kind) cannot learn without moving the actor; set it to 0"


def _router(config: MispoConfig) -> Iterator[str]:
    router = config.router
    if router.replay == "rollout" and not router.record:
        yield "router.replay: rollout needs the experts of the rollout; set router.record=true"
    if router.replay != "off" and config.algorithm.advantage == "gae" and config.critic.kind == "shared":
        yield (
            "router.replay: values are never replayed, but a shared critic (critic.kind) is on the actor's trunk; set "
            "router.replay=off or critic.kind=separate"
        )
    if config.trainer.mtp_weight and config.model.lora.rank:
        yield "trainer.mtp_weight: with adapters (model.lora) the draft heads are frozen; set it to 0"
    if router.freeze and config.model.lora.rank:
        yield "router.freeze: with adapters (model.lora) the routers do not learn anyway; leave it out"


def _inert(config: MispoConfig) -> Iterator[str]:
    defaults = MispoConfig()
    for key, (decider, values) in BELONGS.items():
        chosen = value_of(config, decider)
        if value_of(config, key) != value_of(defaults, key) and chosen not in values:
            options = " or ".join(str(value) for value in values)
            yield f"{key}: nobody reads it while {decider}={chosen}; leave it out, or set {decider}={options}"


def _method(config: MispoConfig) -> Iterator[str]:
    algorithm = config.algorithm
    if algorithm.advantage != "gae":
        if config.rollout.samples_per_prompt == 1:
            yield (
                f"algorithm.advantage: {algorithm.advantage} compares the samples of a prompt, but "
                "rollout.samples_per_prompt is 1; raise it, or use gae"
            )
        if algorithm.truncation == "bootstrap":
            yield (
                f"algorithm.truncation: bootstrap asks a critic, which algorithm.advantage={algorithm.advantage} does "
                "not have; use zero or mask"
            )
    if algorithm.overlong.share and algorithm.truncation == "bootstrap":
        yield (
            "algorithm.overlong.share: bootstrapping replaces the reward of a truncated completion, and the punishment "
            "with it; set algorithm.truncation to zero or mask"
        )
    if algorithm.mask_policy == "current" and algorithm.filter.name not in ("bounds", "token_only"):
        yield (
            f"algorithm.mask_policy: current needs a filter that looks at each trajectory alone, bounds or token_only, "
            f"not {algorithm.filter.name}"
        )
    if len(algorithm.clip) != 2 or not all(0 <= epsilon < math.inf for epsilon in algorithm.clip):
        yield f"algorithm.clip: give two numbers [ε_low, ε_high] ≥ 0, not {list(algorithm.clip)}"
    if algorithm.dual_clip is not None and not algorithm.dual_clip > 1:
        yield f"algorithm.dual_clip: {algorithm.dual_clip} is not above 1; null switches it off"
    if not algorithm.correction_cap > 0:
        yield f"algorithm.correction_cap: {algorithm.correction_cap} is no positive number"
    lora, unused = config.model.lora, LoraConfig(rank=config.model.lora.rank)
    if lora.rank == 0 and lora != unused:
        yield "model.lora: nobody reads alpha and targets while model.lora.rank=0; leave them out, or raise the rank"
    if algorithm.reference is not None and algorithm.kl == 0:
        yield "algorithm.reference: nobody reads it while algorithm.kl=0; leave it out, or raise algorithm.kl"
    if config.critic.value_clip is not None and not 0 < config.critic.value_clip < math.inf:
        yield f"critic.value_clip: {config.critic.value_clip} is no positive number; null switches it off"


def _bounds(key: str, bounds: Sequence[float]) -> Iterator[str]:
    if len(bounds) != 2:
        yield f"{key}: give two numbers [low, high], not {list(bounds)}"
    elif not (0 < bounds[0] <= bounds[1] < math.inf):
        yield f"{key}: {list(bounds)} is no range; 0 < low ≤ high is needed"
    elif not bounds[0] <= 1 <= bounds[1]:
        yield f"{key}: {list(bounds)} leaves out 1, so it rejects samples on which both policies agree"


def _sources(config: MispoConfig) -> Iterator[str]:
    for section, first, second in (("model", "preset", "path"), ("data", "task", "path")):
        values = [getattr(getattr(config, section), name) for name in (first, second)]
        if (values[0] is None) == (values[1] is None):
            state = "neither is" if values[0] is None else f"both are ({values[0]!r} and {values[1]!r})"
            yield f"{section}: set exactly one of {section}.{first} and {section}.{second}; {state}"


def _contradictions(config: MispoConfig) -> Iterator[str]:
    trajectories = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    for name in ("actor_minibatches", "critic_minibatches"):
        parts = getattr(config.trainer, name)
        if parts > trajectories > 0:
            yield (
                f"trainer.{name}: {parts} parts, but a step has only {trajectories} trajectories "
                "(rollout.prompts_per_step × rollout.samples_per_prompt); lower it"
            )
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if config.trainer.tokens_per_microbatch < longest:
        yield (
            f"trainer.tokens_per_microbatch: {config.trainer.tokens_per_microbatch} is less than the longest "
            f"trajectory, {longest} tokens (data.max_prompt_tokens + rollout.max_new_tokens); raise it"
        )
    if config.data.task is None and config.reward.name == "gym":
        yield "reward.name: gym scores reasoning-gym tasks, but data.task is not set; use reward=exact"
    if config.warm_start.steps and config.model.preset is None:
        yield "warm_start.steps: a checkpoint (model.path) needs no warm start; set it to 0"
    if config.model.mtp and config.model.preset is None:
        yield "model.mtp: a checkpoint (model.path) has the draft heads that it has; set it to 0"
    if config.warm_start.steps and config.data.task is None:
        yield "warm_start.steps: traces exist for generated tasks only; set it to 0, or data.task"
    if config.data.task is not None and config.data.split != "train":
        yield "data.split: a generated task has no splits; leave it out"
    if config.data.path is not None and config.data.task_args:
        yield "data.task_args: they belong to data.task, which is not set; leave them out"
    if config.critic.warmup_steps >= config.trainer.steps > 0:
        yield (
            f"critic.warmup_steps: {config.critic.warmup_steps} of trainer.steps = {config.trainer.steps}: "
            "the actor would never move; lower it"
        )
