"""From the `algorithm` section of the config to the functions of mispo/algorithm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mispo.algorithm.controller import QuantileFilter
from mispo.algorithm.filter import (
    Filter,
    FixedFilter,
    bounds_filter,
    keep_all,
    metropolis,
    random_reject,
    token_only,
)
from mispo.algorithm.loss import (
    PolicyLoss,
    cispo_loss,
    gspo_loss,
    icepop,
    mispo_loss,
    no_correction,
    ppo_loss,
    truncated_importance,
)
from mispo.algorithm.method import Advantage, Correction, Method, with_critic, within_group
from mispo.algorithm.objective import Objective
from mispo.config.schema import AlgorithmConfig, FilterConfig, MispoConfig

Pair = tuple[float, float]


def build_method(config: MispoConfig, reward_range: Pair) -> Method:
    """Build the method that the config names. reward_range: lowest and highest reward."""
    algorithm = config.algorithm
    objective = Objective(
        loss=build_loss(algorithm),
        norm=algorithm.loss_norm,
        max_tokens=config.rollout.max_new_tokens,
        kl=algorithm.kl,
        entropy=algorithm.entropy,
    )
    return Method(
        filter=build_filter(algorithm.filter),
        correct=build_correction(algorithm),
        objective=objective,
        advantage=build_advantage(config),
        truncation=algorithm.truncation,
        reward_range=reward_range,
        whitens=algorithm.whiten == "batch",
        rechecks=algorithm.mask_policy == "current",
        learns_truncated=config.critic.train_on_truncated,
        gamma=algorithm.gamma,
    )


def build_advantage(config: MispoConfig) -> Advantage:
    """Build the advantage that algorithm.advantage names."""
    algorithm = config.algorithm
    if algorithm.advantage != "gae":
        return within_group(algorithm.advantage)
    return with_critic(algorithm.gamma, algorithm.lam, config.critic.lam, algorithm.truncation == "bootstrap")


def build_filter(config: FilterConfig) -> Filter:
    """Build the filter that algorithm.filter names."""
    token, window, target = _pair(config.token_bounds), _pair(config.trajectory_bounds), _pair(config.target_acceptance)
    build: dict[str, Callable[[], Filter]] = {
        "bounds": lambda: FixedFilter(partial(bounds_filter, token_bounds=token, trajectory_bounds=window)),
        "quantile": lambda: QuantileFilter(token, target, config.target_steps, config.by_length),
        "metropolis": lambda: FixedFilter(partial(metropolis, ratio=config.ratio)),
        "random": lambda: FixedFilter(partial(random_reject, token_bounds=token, trajectory_bounds=window)),
        "token_only": lambda: FixedFilter(partial(token_only, token_bounds=token)),
        "none": lambda: FixedFilter(keep_all),
    }
    return build[config.name]()


def build_loss(config: AlgorithmConfig) -> PolicyLoss:
    """Build the policy loss that algorithm.loss names."""
    clip = _pair(config.clip)
    losses: dict[str, PolicyLoss] = {
        "mispo": mispo_loss,
        "ppo": partial(ppo_loss, clip=clip, dual_clip=config.dual_clip),
        "gspo": partial(gspo_loss, clip=clip),
        "cispo": partial(cispo_loss, clip=clip),
    }
    return losses[config.loss]


def build_correction(config: AlgorithmConfig) -> Correction:
    """Build the token weights that algorithm.correction names."""
    corrections: dict[str, Correction] = {
        "none": no_correction,
        "tis": partial(truncated_importance, cap=config.correction_cap),
        "icepop": partial(icepop, bounds=_pair(config.correction_bounds)),
    }
    return corrections[config.correction]


def _pair(numbers: list[float]) -> Pair:
    first, second = numbers
    return first, second
