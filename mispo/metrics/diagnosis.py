"""Diagnoses a step: how routing confidence, mismatch, replay and staleness go together in this run, as numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mispo.algorithm.quantiles import quantiles
from mispo.algorithm.segments import Reduce, lengths_of, segment_mean, segment_sum
from mispo.algorithm.variance_shares import jackknife
from mispo.metrics.routing import normalised

CANDIDATES = torch.arange(5, 96, dtype=torch.float64) / 100
"""Quantiles of the confidence at which the fitted threshold may lie."""

LEAST_SIDE = 0.05
"""Share of the tokens that must lie on each side of the fitted threshold."""


ESTIMATES = (
    *("free", "replayed", "fresh", "rms_free", "rms_replayed", "rms_fresh", "replay_gain", "fresh_gain"),
    *("correlation", "confidence", "mean_abs", "agreement", "stale"),
)
"""What `_estimates` returns, in this order."""


@dataclass(frozen=True)
class Evidence:
    """What one rank measured of a step, over its generated tokens.

    log_x_N: log π_old/π_rollout with the trainer's own routing, whether the run replays or not; log_x_replayed_N: with
    the rollout's routing replayed, None = not measured. weights_part_N: the part of stale weights in the log x that the
    run uses, 0 without lag. confidence_N, agreement_N: means over the MoE layers; None for a dense model, or without
    the rollout's routing. chance: k/E. log_window_B2: the filter's bounds on the mean of log x, [B, 2] or [2]; None on
    every rank for a filter without a window on trajectories. replaying: whether the run replays the rollout's routing.
    """

    log_x_N: Tensor
    log_x_replayed_N: Tensor | None
    weights_part_N: Tensor
    confidence_N: Tensor | None
    agreement_N: Tensor | None
    chance: float
    offsets_B1: Tensor
    log_window_B2: Tensor | None
    replaying: bool

    def __post_init__(self) -> None:
        assert not self.replaying or self.log_x_replayed_N is not None, "replay is used, so it must be measured"


@dataclass(frozen=True)
class Diagnosis:
    """How confidence, mismatch, replay and staleness go together, over the generated tokens of all ranks.

    What was not measured, or is not defined, is NaN.

    tokens: those with a finite log x; trajectories: those with tokens. replaying: whether the run replays the rollout's
    routing in the trainer. stale: whether the rollout's weights were older than the trainer's.

    confidence: mean Σ_k over tokens and layers; confidence_norm: on the scale where chance is 0. agreement: share of
    the rollout's experts that the trainer's own routers choose. mean_abs: |log x| with the trainer's own routing, nats.
    threshold: the confidence c* that best separates |log x| (least squares); share_below: of the tokens; below, above:
    mean |log x| on its two sides. correlation: Pearson, of confidence and |log x|; its standard error, like all others,
    by jackknife over trajectories.

    Three variants of the step: free: with the trainer's own routing; replayed: with the rollout's; fresh: as the run
    is, but without the part of stale weights. rms_*: root mean square of log x in each, nats.

    window: [lo, hi] on the trajectory ratio, the widest if trajectories have different ones; free, replayed,
    fresh: share of the trajectories that it accepts. replay_gain = replayed − free; fresh_gain = fresh − as the run is.
    None: the filter has no window; free, replayed, fresh are then NaN, and a gain is the relative reduction of the rms:
    replay_gain = 1 − rms_replayed/rms_free, fresh_gain = 1 − rms_fresh/rms; 0 where there is nothing to reduce.
    """

    tokens: int
    trajectories: int
    replaying: bool
    stale: bool
    confidence: float
    confidence_norm: float
    agreement: float
    mean_abs: float
    threshold: float
    share_below: float
    below: float
    above: float
    correlation: float
    correlation_error: float
    window: tuple[float, float] | None
    free: float
    replayed: float
    fresh: float
    rms_free: float
    rms_replayed: float
    rms_fresh: float
    replay_gain: float
    replay_gain_error: float
    fresh_gain: float
    fresh_gain_error: float

    @property
    def accepted(self) -> float:
        """Share of the trajectories that the window accepts as the run is; NaN without a window."""
        return self.replayed if self.replaying else self.free

    @property
    def rms(self) -> float:
        """Root mean square of log x as the run is, nats."""
        return self.rms_replayed if self.replaying else self.rms_free


def diagnose(evidence: Evidence, everyone: Callable[[Tensor], Tensor], reduce: Reduce) -> Diagnosis:
    """Return the diagnosis, the same on every rank; every rank must call it with its evidence.

    everyone: this rank's [B, …] → all ranks' [total, …], called once. reduce: sum over ranks.
    """
    sums_BX = _sums(evidence)
    windowed, window_B2 = evidence.log_window_B2 is not None, sums_BX[:, :0]
    if evidence.log_window_B2 is not None:
        window_B2 = evidence.log_window_B2.double().expand(len(sums_BX), 2)
    all_BX = everyone(torch.cat([sums_BX, window_B2], 1)).cpu()
    all_BX = all_BX[all_BX[:, 0] > 0]
    sums_BX, window_B2 = all_BX[:, :SUMS], all_BX[:, SUMS:]
    values, errors = (
        dict(zip(ESTIMATES, x.tolist(), strict=True))
        for x in jackknife(sums_BX, lambda sums: _estimates(sums, windowed, evidence.replaying))
    )
    tokens, stale = int(sums_BX[:, 4].sum()), values.pop("stale") > 0
    fitted = (math.nan,) * 4
    if evidence.confidence_N is not None:
        finite_N = _finite(evidence)
        c_N, a_N = evidence.confidence_N[finite_N].float(), evidence.log_x_N[finite_N].double().abs()
        fitted = _stump(c_N, a_N, tokens, values["mean_abs"] * tokens, reduce)
    confidence = torch.tensor(values["confidence"], dtype=torch.float64)
    return Diagnosis(
        tokens=tokens,
        trajectories=len(sums_BX),
        replaying=evidence.replaying,
        stale=stale,
        confidence_norm=normalised(confidence, evidence.chance).item(),
        **dict(zip(("threshold", "share_below", "below", "above"), fitted, strict=True)),
        window=_widest(window_B2) if windowed else None,
        **values,
        **{f"{name}_error": errors[name] for name in ("correlation", "replay_gain", "fresh_gain")},
    )


def _widest(log_window_B2: Tensor) -> tuple[float, float]:
    lows, highs = log_window_B2.unbind(1)
    return math.exp(min(lows.tolist(), default=math.nan)), math.exp(max(highs.tolist(), default=math.nan))


def _finite(evidence: Evidence) -> Tensor:
    """Return which tokens count, [N] bool: those whose log x is finite in every variant."""
    finite_N = evidence.log_x_N.isfinite() & evidence.weights_part_N.isfinite()
    return finite_N if evidence.log_x_replayed_N is None else finite_N & evidence.log_x_replayed_N.isfinite()


SUMS = 14
"""Columns of `_sums`."""


def _sums(evidence: Evidence) -> Tensor:
    """Return what `_estimates` needs of each trajectory, [B, SUMS] float64, in its order."""
    unknown_N = torch.full_like(evidence.log_x_N, torch.nan, dtype=torch.float64)

    def known(x_N: Tensor | None) -> Tensor:
        return unknown_N if x_N is None else x_N.double()

    free_N, weights_N = evidence.log_x_N.double(), evidence.weights_part_N.double()
    replayed_N, c_N, agreed_N = map(known, (evidence.log_x_replayed_N, evidence.confidence_N, evidence.agreement_N))
    fresh_N, a_N = (replayed_N if evidence.replaying else free_N) - weights_N, free_N.abs()
    columns = [torch.ones_like(a_N), c_N, a_N, c_N * c_N, a_N * a_N, c_N * a_N, agreed_N, (weights_N != 0).double()]
    columns += [replayed_N.square(), fresh_N.square()]
    finite_N, offsets_B1 = _finite(evidence), evidence.offsets_B1
    accepted = [_accepted(x_N, evidence) for x_N in (free_N, evidence.log_x_replayed_N, fresh_N)]
    sums = [segment_sum(x_N.where(finite_N, 0), offsets_B1) for x_N in columns]
    return torch.stack([(lengths_of(offsets_B1) > 0).double(), *accepted, *sums], 1)


def _accepted(x_N: Tensor | None, evidence: Evidence) -> Tensor:
    """Return whether the window accepts each trajectory, [B] float64; NaN without a window or a measurement."""
    if x_N is None or evidence.log_window_B2 is None:
        return torch.full_like(evidence.offsets_B1[1:], torch.nan, dtype=torch.float64)
    mean_B = segment_mean(x_N.double(), evidence.offsets_B1)
    low, high = evidence.log_window_B2.double().unbind(-1)
    return ((mean_B >= low) & (mean_B <= high)).double()


def _estimates(sums: Tensor, windowed: bool, replaying: bool) -> Tensor:
    """Map [..., SUMS] to [..., ESTIMATES]. windowed: gains are shares of acceptance; else reductions of the rms."""
    trajectories, free, replayed, fresh, n, c, a, cc, aa, ca, agreed, stale, rr, ff = sums.unbind(-1)
    accepted = [x / trajectories for x in (free, replayed, fresh)]
    c, a, cc, aa, ca, rr, ff = (x / n for x in (c, a, cc, aa, ca, rr, ff))
    # A sum that leaves one trajectory out may be rounded to below 0.
    rms = [x.clamp_min(0).sqrt() for x in (aa, rr, ff)]
    spread = ((cc - c * c) * (aa - a * a)).clamp_min(0)
    # A constant has no correlation, also where rounding leaves it a variance.
    spread = spread.where((cc - c * c > 1e-12 * cc) & (aa - a * a > 1e-12 * aa), torch.nan)
    correlation = (ca - c * a) / spread.sqrt()
    gain = _more_accepted if windowed else _rms_reduced
    free, replayed, fresh = accepted if windowed else rms
    gains = gain(free, replayed), gain(replayed if replaying else free, fresh)
    return torch.stack([*accepted, *rms, *gains, correlation, c, a, agreed / n, stale / n], -1)


def _more_accepted(before: Tensor, after: Tensor) -> Tensor:
    return after - before


def _rms_reduced(before: Tensor, after: Tensor) -> Tensor:
    return (1 - after / before).where(before > 0, after * 0)


def _stump(c_N: Tensor, a_N: Tensor, tokens: int, total: float, reduce: Reduce) -> tuple[float, float, float, float]:
    """Return (threshold, share of tokens below it, mean of a below, mean of a above) with the least squared error of a.

    c_N float32 and a_N: this rank's; tokens, total: number and sum of a on all ranks. NaN where no candidate has enough
    tokens on both sides.
    """
    candidates_C = quantiles(c_N[None], CANDIDATES, reduce)[0]
    order_N = c_N.argsort()
    running = torch.nn.functional.pad(a_N[order_N].cumsum(0), (1, 0))
    count_C = torch.searchsorted(c_N[order_N], candidates_C)
    below_C, sum_C = reduce(torch.stack([count_C.double(), running[count_C]])).cpu().unbind(0)
    above_C = tokens - below_C
    allowed_C = torch.minimum(below_C, above_C) >= LEAST_SIDE * tokens
    if not tokens or not allowed_C.any():
        return (math.nan,) * 4
    # Of the squared error only this part depends on the threshold.
    explained_C = (sum_C.square() / below_C + (total - sum_C).square() / above_C).where(allowed_C, -torch.inf)
    best = int(explained_C.argmax())
    below, found = below_C[best].item(), sum_C[best].item()
    return candidates_C[best].item(), below / tokens, found / below, (total - found) / (tokens - below)


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return a plain dict for JSON; NaN and infinities become null, and so does a window that does not exist."""
    values = dataclasses.asdict(diagnosis)
    values["window"] = None if diagnosis.window is None else list(diagnosis.window)
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in values.items()}


def from_json(values: Mapping[str, Any]) -> Diagnosis:
    """Invert `as_json`; null becomes NaN. KeyError if a field is missing; other keys are ignored."""
    found = {field.name: values[field.name] for field in dataclasses.fields(Diagnosis)}
    window = found.pop("window")
    numbers: dict[str, Any] = {key: math.nan if x is None else x for key, x in found.items()}
    return Diagnosis(window=None if window is None else (window[0], window[1]), **numbers)
