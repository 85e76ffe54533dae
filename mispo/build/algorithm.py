"""Build a method from the `algorithm` section of the config and the functions of mispo/algorithm."""

from __future__ import annotations

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
from mispo.config import algorithm_parts as parts
from mispo.config.parts import ValueCritic
from mispo.config.schema import MispoConfig

Pair = tuple[float, float]


def build_method(config: MispoConfig, reward_range: Pair) -> Method:
    """Build the method that the config names. reward_range: lowest and highest reward."""
    algorithm, critic = config.algorithm, config.critic
    objective = Objective(
        loss=build_loss(algorithm.loss),
        norm=algorithm.loss_norm,
        max_tokens=config.rollout.max_new_tokens,
        kl=algorithm.kl,
        entropy=algorithm.entropy,
    )
    return Method(
        filter=build_filter(algorithm.filter),
        correct=build_correction(algorithm.correction),
        objective=objective,
        advantage=build_advantage(config),
        truncation=algorithm.truncation,
        reward_range=reward_range,
        whitens=algorithm.whiten == "batch",
        rechecks=algorithm.mask_policy == "current",
        learns_truncated=critic.train_on_truncated if isinstance(critic, ValueCritic) else True,
        gamma=algorithm.advantage.gamma if isinstance(algorithm.advantage, parts.Gae) else 1.0,
    )


def build_advantage(config: MispoConfig) -> Advantage:
    """Build the chosen advantage (algorithm/advantage)."""
    chosen, critic = config.algorithm.advantage, config.critic
    if isinstance(chosen, parts.Gae) and isinstance(critic, ValueCritic):
        return with_critic(chosen.gamma, chosen.lam, critic.lam, config.algorithm.truncation == "bootstrap")
    assert isinstance(chosen, parts.GroupStd | parts.GroupMean | parts.Rloo), f"no advantage is built for {chosen}"
    return within_group(chosen.name)


def build_filter(chosen: parts.FilterPart) -> Filter:
    """Build the chosen filter (algorithm/filter)."""
    match chosen:
        case parts.Bounds():
            tokens, trajectories = _pair(chosen.token_bounds), _pair(chosen.trajectory_bounds)
            return FixedFilter(partial(bounds_filter, token_bounds=tokens, trajectory_bounds=trajectories))
        case parts.Quantile():
            target = _pair(chosen.target_acceptance)
            return QuantileFilter(_pair(chosen.token_bounds), target, chosen.target_steps, chosen.by_length)
        case parts.Metropolis():
            return FixedFilter(partial(metropolis, ratio=chosen.ratio))
        case parts.Random():
            tokens, trajectories = _pair(chosen.token_bounds), _pair(chosen.trajectory_bounds)
            return FixedFilter(partial(random_reject, token_bounds=tokens, trajectory_bounds=trajectories))
        case parts.TokenOnly():
            return FixedFilter(partial(token_only, token_bounds=_pair(chosen.token_bounds)))
        case parts.KeepAll():
            return FixedFilter(keep_all)
    raise AssertionError(f"no filter is built for {chosen}")


def build_loss(chosen: parts.LossPart) -> PolicyLoss:
    """Build the chosen policy loss (algorithm/loss)."""
    match chosen:
        case parts.Mispo():
            return mispo_loss
        case parts.Ppo():
            return partial(ppo_loss, clip=_pair(chosen.clip), dual_clip=chosen.dual_clip)
        case parts.Gspo():
            return partial(gspo_loss, clip=_pair(chosen.clip))
        case parts.Cispo():
            return partial(cispo_loss, clip=_pair(chosen.clip))
    raise AssertionError(f"no loss is built for {chosen}")


def build_correction(chosen: parts.CorrectionPart) -> Correction:
    """Build the chosen correction (algorithm/correction)."""
    match chosen:
        case parts.NoCorrection():
            return no_correction
        case parts.Tis():
            return partial(truncated_importance, cap=chosen.cap)
        case parts.IcePop():
            return partial(icepop, bounds=_pair(chosen.bounds))
    raise AssertionError(f"no correction is built for {chosen}")


def _pair(numbers: list[float]) -> Pair:
    first, second = numbers
    return first, second
