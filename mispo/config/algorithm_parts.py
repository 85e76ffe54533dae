"""The parts of a method: filters, losses, corrections and advantages, with their formulas.

Written like the other parts (`mispo.config.parts`); the functions that compute them are in `mispo/algorithm/`. The
symbols of the formulas: x = π_old/π_rollout, ρ̄ its geometric mean over a trajectory, r = π_θ/π_old, s its geometric
mean, Â advantage, R̂ return.
"""

# ruff: noqa: RUF009  (`setting` declares a field)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mispo.config.parts import Part
from mispo.config.setting import around_one, setting

# Filters --------------------------------------------------------------------------------------------------------------


@dataclass
class FilterPart(Part):
    """Which tokens and trajectories are kept. Every filter looks at token ratios x = π_old/π_rollout."""

    alone: ClassVar[bool] = False
    """Whether it looks at each trajectory alone, so that it can be applied to one mini-batch (mask_policy: current)."""

    def formula(self, x: str, rho: str) -> str:
        """The factor of a token in the objective, with its `·`. x, rho: symbols of token and trajectory ratio."""
        raise NotImplementedError


@dataclass
class TokenFilter(FilterPart):
    """A filter with a test of each token."""

    token_bounds: list[float] = setting([0.5, 2.0], length=2, above=0, test=around_one)
    """Kept tokens have low ≤ x ≤ high (report: [0.5, 2])."""

    def formula(self, x: str, rho: str) -> str:
        return f"1[{between(self.token_bounds, x)}]·"


@dataclass
class WindowFilter(TokenFilter):
    """A filter with a test of each token and fixed bounds on trajectories."""

    trajectory_bounds: list[float] = setting([0.996, 1.001], length=2, above=0, test=around_one)
    """Bounds on the geometric mean of a trajectory's token ratios (report: [0.996, 1.001])."""


@dataclass
class Bounds(WindowFilter):
    """Keep tokens and trajectories whose ratios are within fixed bounds: MIS-PO's filter (report §5.2.1)."""

    alone: ClassVar[bool] = True
    name: str = field(default="bounds", init=False)

    def formula(self, x: str, rho: str) -> str:
        return f"{super().formula(x, rho)}1[{between(self.trajectory_bounds, rho)}]·"


@dataclass
class Random(WindowFilter):
    """Keep as many trajectories as `bounds` would, chosen at random: the control of the trajectory test. Ours."""

    name: str = field(default="random", init=False)

    def formula(self, x: str, rho: str) -> str:
        return f"{super().formula(x, rho)}1[random, as many as {between(self.trajectory_bounds, rho)}]·"


@dataclass
class TokenOnly(TokenFilter):
    """Keep tokens whose ratio is within bounds, of every trajectory. An ablation."""

    alone: ClassVar[bool] = True
    name: str = field(default="token_only", init=False)


@dataclass
class Quantile(TokenFilter):
    """Keep tokens within bounds, and trajectories within a window that aims at an acceptance. Ours."""

    name: str = field(default="quantile", init=False)
    target_acceptance: list[float] = setting([0.4, 0.2], length=2, least=0, most=1)
    """Wanted share of accepted trajectories, [at the first step, after `target_steps`], in [0, 1]."""
    target_steps: int = setting(50, least=0)
    """Steps over which the target moves."""
    by_length: bool = False
    """A separate window for each bucket of lengths (those of mis/accept_len/*)."""

    def formula(self, x: str, rho: str) -> str:
        return f"{super().formula(x, rho)}1[|log ρ̄| ≤ b_k]·"


@dataclass
class Metropolis(FilterPart):
    """Count trajectories as the independence chain over a prompt's samples visits them (Tierney 1994); some count
    several times."""

    name: str = field(default="metropolis", init=False)
    ratio: str = setting("trajectory", choices=("trajectory", "mean"))
    """trajectory: product of the token ratios, for which the chain is exact; mean: their geometric mean, a heuristic
    that accepts long traces more easily. Ours."""

    def formula(self, x: str, rho: str) -> str:
        return f"multiplicity(w = {'∏x' if self.ratio == 'trajectory' else 'ρ̄'})·"


@dataclass
class KeepAll(FilterPart):
    """Keep every sample."""

    name: str = field(default="none", init=False)

    def formula(self, x: str, rho: str) -> str:
        return ""


FILTERS: tuple[type[FilterPart], ...] = (Bounds, Quantile, Metropolis, Random, TokenOnly, KeepAll)


# Losses ---------------------------------------------------------------------------------------------------------------


@dataclass
class LossPart(Part):
    """What the actor maximises for a token, before the weights of filter and correction."""

    def formula(self) -> str:
        """The term of a token: r = π_θ/π_old, s its geometric mean over a trajectory, Â the advantage."""
        raise NotImplementedError


@dataclass
class Mispo(LossPart):
    """The score function, without a ratio (report §5.2.1)."""

    name: str = field(default="mispo", init=False)

    def formula(self) -> str:
        return "Â·log π_θ"


@dataclass
class Ppo(LossPart):
    """PPO's clipped ratio of tokens (arXiv 1707.06347)."""

    name: str = field(default="ppo", init=False)
    clip: list[float] = setting([0.2, 0.2], length=2, least=0)
    """r is clipped to [1 − first, 1 + second] (PPO: 0.2 and 0.2)."""
    dual_clip: float | None = setting(3.0, above=1, null="switches it off")
    """Where Â < 0 a token's loss is at most this times |Â|; > 1; None = off (arXiv 1912.09729: 3)."""

    def formula(self) -> str:
        clipped = clipped_ratio("r", self.clip)
        return clipped if self.dual_clip is None else f"max({clipped}, −{self.dual_clip:g}·|Â|)"


@dataclass
class Gspo(LossPart):
    """PPO's clip on the ratio of whole trajectories (GSPO, arXiv 2507.18071)."""

    name: str = field(default="gspo", init=False)
    clip: list[float] = setting([3.0e-4, 4.0e-4], length=2, least=0)
    """s is clipped to [1 − first, 1 + second] (GSPO: 3e-4 and 4e-4)."""

    def formula(self) -> str:
        return clipped_ratio("s", self.clip)


@dataclass
class Cispo(LossPart):
    """The score function, weighted by the clipped ratio of the token (CISPO, arXiv 2506.13585)."""

    name: str = field(default="cispo", init=False)
    clip: list[float] = setting([1.0, 4.0], length=2, least=0)
    """The weight is r clipped to [1 − first, 1 + second]: at most 5, no lower bound. Ours; CISPO tunes it."""

    def formula(self) -> str:
        low, high = ends(self.clip)
        return f"sg[clip(r, {low}, {high})]·Â·log π_θ"


LOSSES: tuple[type[LossPart], ...] = (Mispo, Ppo, Gspo, Cispo)


# Corrections ----------------------------------------------------------------------------------------------------------


@dataclass
class CorrectionPart(Part):
    """The weight of a token for the mismatch x = π_old/π_rollout."""

    def formula(self) -> str:
        """The factor of a token in the objective, with its `·`."""
        raise NotImplementedError


@dataclass
class NoCorrection(CorrectionPart):
    """Weight 1."""

    name: str = field(default="none", init=False)

    def formula(self) -> str:
        return ""


@dataclass
class Tis(CorrectionPart):
    """Truncated importance sampling: weight min(x, cap) (Ionides 2008)."""

    name: str = field(default="tis", init=False)
    cap: float = setting(2.0, above=0, finite=False)
    """Largest weight, > 0; inf (in YAML .inf) = plain importance weights."""

    def formula(self) -> str:
        return f"min(x, {self.cap:g})·"


@dataclass
class IcePop(CorrectionPart):
    """Weight x within bounds, else 0 (IcePop, Ant Ling 2025)."""

    name: str = field(default="icepop", init=False)
    bounds: list[float] = setting([0.5, 5.0], length=2, above=0, test=around_one)
    """low ≤ x ≤ high is kept (IcePop: [0.5, 5])."""

    def formula(self) -> str:
        return f"x·1[{between(self.bounds, 'x')}]·"


CORRECTIONS: tuple[type[CorrectionPart], ...] = (NoCorrection, Tis, IcePop)


# Advantages -----------------------------------------------------------------------------------------------------------


@dataclass
class AdvantagePart(Part):
    """What a token is worth: from a critic, or from the other samples of the prompt."""

    needs_critic: ClassVar[bool] = False
    """Whether it takes values from a critic; else it compares the samples of a prompt."""

    def formula(self) -> str:
        """Â before whitening; R̂ is the return."""
        raise NotImplementedError


@dataclass
class Gae(AdvantagePart):
    """Generalised advantage estimation from a critic (report; arXiv 1506.02438)."""

    needs_critic: ClassVar[bool] = True
    name: str = field(default="gae", init=False)
    gamma: float = setting(1.0, above=0, most=1)
    """Discount, in (0, 1] (report: 1)."""
    lam: float = setting(1.0, least=0, most=1)
    """λ of the advantages, in [0, 1] (report: 1)."""

    def formula(self) -> str:
        return f"GAE(γ={self.gamma:g}, λ={self.lam:g})"


@dataclass
class GroupStd(AdvantagePart):
    """Compare with the mean of the prompt's samples, in units of their deviation (GRPO, arXiv 2402.03300)."""

    name: str = field(default="group_std", init=False)

    def formula(self) -> str:
        return "(R̂ − mean_group)/std_group"


@dataclass
class GroupMean(AdvantagePart):
    """Compare with the mean of the prompt's samples (Dr. GRPO, arXiv 2503.20783)."""

    name: str = field(default="group_mean", init=False)

    def formula(self) -> str:
        return "R̂ − mean_group"


@dataclass
class Rloo(AdvantagePart):
    """Compare with the mean of the prompt's other samples (RLOO, arXiv 2402.14740)."""

    name: str = field(default="rloo", init=False)

    def formula(self) -> str:
        return "R̂ − mean of the others"


ADVANTAGES: tuple[type[AdvantagePart], ...] = (Gae, GroupStd, GroupMean, Rloo)


def between(bounds: list[float], symbol: str) -> str:
    """Write low ≤ symbol ≤ high."""
    return f"{bounds[0]:g} ≤ {symbol} ≤ {bounds[1]:g}"


def ends(clip: list[float]) -> tuple[str, str]:
    """Write the lower and the upper end of a clipped ratio."""
    return f"{1 - clip[0]:g}", f"{1 + clip[1]:g}"


def clipped_ratio(ratio: str, clip: list[float]) -> str:
    """Write PPO's pessimistic minimum of the plain and the clipped term."""
    low, high = ends(clip)
    return f"min({ratio}·Â, clip({ratio}, {low}, {high})·Â)"
