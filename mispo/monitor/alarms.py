"""Alarms: signs in a step's metrics that a run has gone wrong, with a likely cause and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mispo.config.schema import MispoConfig
from mispo.monitor.rows import Row

CONSTANT_CRITIC = 0.01
"""Explained variance below which a critic that bootstraps knows nothing about the returns."""

BOOTSTRAP_GAP = 0.25
"""Share of the reward's range by which bootstrapped and finished returns may differ on average."""


@dataclass(frozen=True)
class Alarm:
    """A sign that is due. name: of its rule in RULES. text: metric and value, suspected cause, advice."""

    name: str
    text: str


@dataclass
class Alarms:
    """Counts in how many steps in a row each sign was seen; an alarm is due once, when `patience` is reached."""

    config: MispoConfig
    _seen: dict[str, int] = field(default_factory=dict)

    @property
    def stops(self) -> bool:
        """Whether an alarm ends the run (alarms.action=stop)."""
        return self.config.alarms.action == "stop"

    def check(self, metrics: Row) -> list[Alarm]:
        """Return the alarms that are due after this step."""
        if self.config.alarms.action == "off":
            return []
        due = []
        for name, rule in RULES.items():
            text = rule(metrics, self.config)
            self._seen[name] = self._seen.get(name, 0) + 1 if text else 0
            if text and self._seen[name] == self.config.alarms.patience:
                due.append(Alarm(name, f"{text} (for {self._seen[name]} steps)"))
        return due

    def state(self) -> dict[str, int]:
        """Return what `restore` takes."""
        return dict(self._seen)

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue counting where a checkpoint was."""
        self._seen = dict(state)


def acceptance(metrics: Row, config: MispoConfig) -> str | None:
    """Say that the filter rejects nearly everything, so that the actor stands still or follows a few odd samples."""
    accepted, least = metrics["mis/traj_accept"] * metrics["mis/token_accept"], config.alarms.min_acceptance
    if accepted >= least:
        return None
    return f"mis/traj_accept: {accepted:.2%} of the samples accepted, less than {least:.2%}. {mismatch_cause(config)}"


def mismatch(metrics: Row, config: MispoConfig) -> str | None:
    """Say that rollout and trainer are two policies."""
    if metrics["mismatch/k3"] <= config.alarms.max_mismatch:
        return None
    return (
        f"mismatch/k3: {metrics['mismatch/k3']:.3g} nats per token between rollout and trainer, more than "
        f"{config.alarms.max_mismatch:g}. {mismatch_cause(config)}"
    )


def mismatch_cause(config: MispoConfig) -> str:
    """Name the likeliest cause of a mismatch that the settings admit, and the remedy."""
    rollout = config.rollout
    if rollout.lag:
        return (
            f"Suspected: stale weights (rollout.lag={rollout.lag}); lower it or trainer.actor_lr, or widen "
            "the window (algorithm=mispo_quantile follows the run)"
        )
    if rollout.dtype != config.trainer.dtype or "bf16" in rollout.dtype or "fp16" in rollout.dtype:
        return (
            f"Suspected: precision (rollout.dtype={rollout.dtype}, trainer.dtype={config.trainer.dtype}); use the same "
            "in both, or fp32"
        )
    if rollout.temperature != 1:
        return f"Suspected: temperature (rollout.temperature={rollout.temperature:g}); try 1"
    return "Suspected: precision or the rollout engine; look at sync/mean_abs, and try rollout.dtype=fp32"


def critic(metrics: Row, config: MispoConfig) -> str | None:
    """Say that the critic has drifted to a constant, on its own bootstrapped targets."""
    explained, gap = metrics.get("critic/vf_explained_var"), metrics.get("trunc/bootstrap_gap")
    if config.algorithm.truncation != "bootstrap" or explained is None or gap is None:
        return None
    if not (explained < CONSTANT_CRITIC and abs(gap) > BOOTSTRAP_GAP):
        return None
    return (
        f"critic/vf_explained_var: {explained:.3f}, while truncated trajectories return "
        f"{metrics['trunc/bootstrap_mean']:.3f} and finished ones {metrics['reward/finished_mean']:.3f}. Suspected: "
        "the critic drifts on its own bootstrapped targets; raise rollout.max_new_tokens or critic.warmup_steps, or "
        "set algorithm.truncation=zero"
    )


def rewards(metrics: Row, config: MispoConfig) -> str | None:
    """Say that the verifier fails on most completions."""
    if metrics["reward/failed"] <= config.alarms.max_failed_rewards:
        return None
    return (
        f"reward/failed: the verifier failed on {metrics['reward/failed']:.0%} of the completions (error, timeout, or "
        "a value that is no number or outside of its declared range), which count as its lowest reward. The messages "
        "are in rollouts/step_N.parquet, column message; look at reward.parts and reward.timeout_s"
    )


def routing(metrics: Row, config: MispoConfig) -> str | None:
    """Say that the routers drift: less sure than at the start, or unlike the rollout's. Nothing for a dense model."""
    signs = []
    replays = config.router.replay == "rollout"
    remedy = "" if replays else ", or replay the rollout's routing (router.replay=rollout)"
    agreed, least = metrics.get("moe/expert_agreement"), config.alarms.min_agreement
    if agreed is not None and agreed < least:
        signs.append(
            f"moe/expert_agreement: the trainer's routers choose {agreed:.1%} of the rollout's experts, less than "
            f"{least:.1%}. {mismatch_cause(config)}{remedy}"
        )
    low, most = metrics.get("moe/low_confidence/mean"), config.alarms.max_low_confidence
    if low is not None and low > most:
        signs.append(
            f"moe/low_confidence/mean: the routers are less sure of {low:.0%} of the tokens than they were of all but "
            f"a tenth in step 1, more than {most:.0%}. Suspected: they drift, which widens the mismatch; lower "
            f"trainer.actor_lr, stay nearer to on-policy (rollout.lag){remedy}"
        )
    return ". ".join(signs) or None


RULES: Mapping[str, Callable[[Row, MispoConfig], str | None]] = {
    "acceptance": acceptance,
    "mismatch": mismatch,
    "critic": critic,
    "rewards": rewards,
    "routing": routing,
}
