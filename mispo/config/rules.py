"""Rules between the sections of a config. Every message names the key and the fix; all problems are told at once."""

from __future__ import annotations

from collections.abc import Iterator

from mispo.config.parts import NoCritic, SeparateCritic, SharedCritic
from mispo.config.registry import PARTS, chosen_part, part_name
from mispo.config.schema import MispoConfig, SourceConfig
from mispo.config.setting import setting_problems


def check_config(config: MispoConfig) -> None:
    """Check ranges and contradictions. ValueError with one line per problem."""
    rules = (_fixed_names, _model, _data, _rewards, _advantage, _method, _shared_critic, _router, _trainer, _batches)
    problems = [*setting_problems(config), *(problem for rule in rules for problem in rule(config))]
    if problems:
        raise ValueError("\n".join(problems))


def _fixed_names(config: MispoConfig) -> Iterator[str]:
    for group in PARTS:
        part = chosen_part(config, group)
        if part.name != part_name(type(part)):
            yield f"{group.replace('/', '.')}.name: is fixed by the part; choose it with {group}={part.name}"


def _model(config: MispoConfig) -> Iterator[str]:
    model = config.model
    yield from _one_of("model", "preset", model.preset, model.path)
    if model.preset is not None:
        return
    if config.warm_start.steps:
        yield "warm_start.steps: a checkpoint (model.path) needs no warm start; set it to 0"
    if model.mtp:
        yield "model.mtp: a checkpoint (model.path) keeps the draft heads that it has; set it to 0"


def _data(config: MispoConfig) -> Iterator[str]:
    data = config.data
    if data.mixture and (data.task is not None or data.path is not None):
        yield "data.mixture: replaces the source in data.task and data.path; set both to null, or leave it out"
    for key, source in sources(config).items():
        yield from _source(key, source)
    for name, entry in config.eval.sets.items():
        yield from _source(f"eval.sets.{name}", entry)
        if entry.task is not None and entry.size is None:
            yield f"eval.sets.{name}.size: a generated task has no end; say how many problems"
    if config.warm_start.steps and data.mixture:
        yield "warm_start.steps: traces exist for data.task, and data.mixture has none; set it to 0"
    elif config.warm_start.steps and any(source.task is None for source in sources(config).values()):
        yield "warm_start.steps: traces exist for generated tasks only; set it to 0, or data.task"


def sources(config: MispoConfig) -> dict[str, SourceConfig]:
    """The sources of training prompts, by dotted key."""
    mixed: dict[str, SourceConfig] = {f"data.mixture.{name}": entry for name, entry in config.data.mixture.items()}
    return mixed or {"data": config.data}


def _source(key: str, source: SourceConfig) -> Iterator[str]:
    yield from _one_of(key, "task", source.task, source.path)
    if source.task is not None and source.split != "train":
        yield f"{key}.split: a generated task has no splits; leave it out"
    if source.path is not None and source.task_args:
        yield f"{key}.task_args: belong to {key}.task, which is not set; leave them out"


def _one_of(section: str, first: str, first_value: str | None, path: str | None) -> Iterator[str]:
    if (first_value is None) == (path is None):
        state = "neither is" if path is None else f"both are ({first_value!r} and {path!r})"
        yield f"{section}: set exactly one of {section}.{first} and {section}.path; {state}"


TAKEN = ("mean", "failed", "finished_mean", "overlong_penalty")
"""Names under reward/ that are no parts of the reward."""


def _rewards(config: MispoConfig) -> Iterator[str]:
    parts = config.reward.parts
    if not any(part.weight for part in parts.values()):
        yield "reward.parts: no part has a weight, so there is nothing to learn; give one a weight above 0"
    files = [key for key, source in sources(config).items() if source.task is None and source.path is not None]
    for name, part in parts.items():
        if name in TAKEN:
            yield f"reward.parts.{name}: the metric reward/{name} exists already; give the part another name"
        if part.name == "gym" and config.data.mixture:
            yield f"reward.parts.{name}.name: gym scores data.task, and data.mixture has none; use reward=exact"
        elif part.name == "gym" and files:
            yield (
                f"reward.parts.{name}.name: gym scores reasoning-gym tasks, but {files[0]}.task is not set; use "
                "reward=exact"
            )


def _advantage(config: MispoConfig) -> Iterator[str]:
    algorithm = config.algorithm
    name, has_critic = algorithm.advantage.name, not isinstance(config.critic, NoCritic)
    if algorithm.advantage.needs_critic and not has_critic:
        yield (
            f"algorithm.advantage: {name} needs a critic, but critic is none; choose critic=separate or shared, or "
            "another algorithm/advantage"
        )
    if not algorithm.advantage.needs_critic:
        if has_critic:
            yield (
                f"critic: {config.critic.name} has no effect with algorithm/advantage={name}; choose critic=none, or "
                "algorithm/advantage=gae"
            )
        if config.rollout.samples_per_prompt == 1:
            yield (
                f"algorithm.advantage: {name} compares the samples of a prompt, but rollout.samples_per_prompt is 1; "
                "raise it, or choose algorithm/advantage=gae"
            )
        if algorithm.truncation == "bootstrap":
            yield (
                f"algorithm.truncation: bootstrap needs a critic, and algorithm/advantage={name} uses none; set zero "
                "or mask"
            )


def _method(config: MispoConfig) -> Iterator[str]:
    algorithm = config.algorithm
    if algorithm.overlong.share and algorithm.truncation == "bootstrap":
        yield (
            "algorithm.overlong.share: bootstrapping replaces the reward of a truncated completion, and the punishment "
            "with it; set algorithm.truncation to zero or mask"
        )
    if algorithm.mask_policy == "current" and not algorithm.filter.alone:
        alone = " or ".join(part_name(part) for part in PARTS["algorithm/filter"] if getattr(part, "alone", False))
        yield (
            f"algorithm.mask_policy: current needs a filter that looks at each trajectory alone, not "
            f"{algorithm.filter.name}; choose algorithm/filter={alone}"
        )


def _shared_critic(config: MispoConfig) -> Iterator[str]:
    """One joint loss uses each sample once, and moves the policy with every update."""
    trainer = config.trainer
    if not isinstance(config.critic, SharedCritic):
        return
    if trainer.critic_minibatches != trainer.actor_minibatches:
        yield (
            f"trainer.critic_minibatches: must be trainer.actor_minibatches, {trainer.actor_minibatches}, with "
            f"critic=shared, which learns in the actor's updates (is {trainer.critic_minibatches})"
        )
    if config.router.replay != "off":
        yield (
            "router.replay: values are never replayed, but critic=shared is on the actor's trunk; set "
            "router.replay=off or choose critic=separate"
        )


def _router(config: MispoConfig) -> Iterator[str]:
    if config.router.replay == "rollout" and not config.router.record:
        yield "router.replay: rollout needs the experts of the rollout; set router.record=true"
    if config.trainer.mtp_weight and config.model.lora.rank:
        yield "trainer.mtp_weight: with adapters (model.lora) the draft heads are frozen; set it to 0"
    if config.router.freeze and config.model.lora.rank:
        yield "router.freeze: with adapters (model.lora) the routers do not learn anyway; leave it out"


def _trainer(config: MispoConfig) -> Iterator[str]:
    trainer, critic = config.trainer, config.critic
    least = {"optimizer": 1, "parameters": 3}.get(trainer.offload, 0)
    if trainer.zero_stage < least:
        yield (
            f"trainer.offload: {trainer.offload} needs trainer.zero_stage to be at least {least} (is "
            f"{trainer.zero_stage})"
        )
    if isinstance(critic, SeparateCritic) and critic.warmup_steps >= trainer.steps > 0:
        yield (
            f"critic.warmup_steps: must be less than trainer.steps, {trainer.steps}, or the actor never moves (is "
            f"{critic.warmup_steps})"
        )


def _batches(config: MispoConfig) -> Iterator[str]:
    trainer, rollout = config.trainer, config.rollout
    trajectories = rollout.prompts_per_step * rollout.samples_per_prompt
    for name, parts in (("actor", trainer.actor_minibatches), ("critic", trainer.critic_minibatches)):
        if parts > trajectories > 0:
            yield (
                f"trainer.{name}_minibatches: must be at most the trajectories of a step, {trajectories} "
                f"(rollout.prompts_per_step × rollout.samples_per_prompt; is {parts})"
            )
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    if trainer.tokens_per_microbatch < longest:
        yield (
            f"trainer.tokens_per_microbatch: must be at least the longest trajectory, {longest} tokens "
            f"(data.max_prompt_tokens + rollout.max_new_tokens; is {trainer.tokens_per_microbatch})"
        )
