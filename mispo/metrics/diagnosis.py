"""Where a model stands: how routing confidence, mismatch, replay and staleness go together in this run, as numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mispo.algorithm.jackknife import jackknife
from mispo.algorithm.quantiles import quantiles
from mispo.algorithm.segments import Reduce, lengths_of, segment_mean, segment_sum
from mispo.metrics.routing import normalised

CANDIDATES = torch.arange(5, 96, dtype=torch.float64) / 100
"""Quantiles of the confidence at which the fitted threshold may lie."""

LEAST_SIDE = 0.05
"""Share of the tokens that must lie on each side of the fitted threshold."""


@dataclass(frozen=True)
class Standing:
    """Over the generated tokens of all ranks. What was not measured, or is not defined, is NaN.

    tokens: those with a finite log x; trajectories: those with tokens. replaying: whether the run replays the rollout's
    routing in the trainer. stale: whether the rollout's weights were older than the trainer's.

    confidence: mean Σ_k over tokens and layers; confidence_norm: on the scale where chance is 0. agreement: share of
    the rollout's experts that the trainer's own routers choose. mean_abs: |log x| with the trainer's own routing, nats.
    threshold: the confidence c* that best separates |log x| (least squares); share_below: of the tokens; below, above:
    mean |log x| on its two sides. correlation: Pearson, of confidence and |log x|; its standard error, like all others,
    by jackknife over trajectories.

    window: [lo, hi] on the trajectory ratio, the widest if trajectories have windows of their own. Shares of the
    trajectories that it accepts: free: with the trainer's own routing; replayed: with the rollout's; fresh: as the run
    is, but without the part of stale weights. replay_gain = replayed − free; fresh_gain = fresh − as the run is.
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
    window: tuple[float, float]
    free: float
    replayed: float
    fresh: float
    replay_gain: float
    replay_gain_error: float
    fresh_gain: float
    fresh_gain_error: float

    @property
    def accepted(self) -> float:
        """Share of the trajectories that the window accepts as the run is."""
        return self.replayed if self.replaying else self.free


def standing_of(
    *,
    log_x_N: Tensor,
    log_x_replayed_N: Tensor | None,
    weights_part_N: Tensor,
    confidence_N: Tensor | None,
    agreement_N: Tensor | None,
    chance: float,
    offsets_B1: Tensor,
    log_window_B2: Tensor,
    replaying: bool,
    everyone: Callable[[Tensor], Tensor],
    reduce: Reduce,
) -> Standing:
    """The standing, from this rank's tokens; the same on every rank, and all must call it.

    log_x_N: log π_old/π_rollout with the trainer's own routing, whether the run replays or not; log_x_replayed_N: with
    the rollout's routing replayed, None = not measured. weights_part_N: the part of stale weights in the log x that the
    run uses, 0 without lag. confidence_N, agreement_N: means over the MoE layers; None for a dense model, or without
    the rollout's routing. chance: k/E. log_window_B2: bounds on the mean of log x, [B, 2] or [2]. everyone: this rank's
    [B, …] → all ranks' [total, …]. reduce: sum over ranks.
    """
    assert not replaying or log_x_replayed_N is not None, "a run that replays has measured log x under replay"
    unknown_N = torch.full_like(log_x_N, torch.nan, dtype=torch.float64)
    log_x_N, weights_part_N = log_x_N.double(), weights_part_N.double()
    replayed_N = unknown_N if log_x_replayed_N is None else log_x_replayed_N.double()
    c_N = unknown_N if confidence_N is None else confidence_N.double()
    agreed_N = unknown_N if agreement_N is None else agreement_N.double()
    a_N, finite_N = log_x_N.abs(), log_x_N.isfinite()
    columns = [
        torch.ones_like(a_N),
        c_N,
        a_N,
        c_N * c_N,
        a_N * a_N,
        c_N * a_N,
        agreed_N,
        (weights_part_N != 0).double(),
    ]
    sums = [segment_sum(column_N.where(finite_N, 0), offsets_B1) for column_N in columns]
    log_window_B2 = log_window_B2.double().expand(len(offsets_B1) - 1, 2)

    def inside(x_N: Tensor) -> Tensor:
        mean_B = segment_mean(x_N, offsets_B1)
        return ((mean_B >= log_window_B2[:, 0]) & (mean_B <= log_window_B2[:, 1])).double()

    free_B = inside(log_x_N)
    replayed_B = torch.full_like(free_B, torch.nan) if log_x_replayed_N is None else inside(replayed_N)
    fresh_B = inside((replayed_N if replaying else log_x_N) - weights_part_N)
    filled_B = (lengths_of(offsets_B1) > 0).double()
    mine_BX = torch.stack([filled_B, free_B, replayed_B, fresh_B, *sums, *log_window_B2.unbind(1)], 1)
    all_BX = everyone(mine_BX).cpu()
    all_BX = all_BX[all_BX[:, 0] > 0]
    lows, highs = all_BX[:, -2].tolist(), all_BX[:, -1].tolist()
    values, errors = jackknife(all_BX[:, :-2], lambda sums: _estimates(sums, replaying))
    free, replayed, fresh, replay_gain, fresh_gain, correlation, c, a, agreed, stale = values.tolist()
    tokens = int(all_BX[:, 4].sum())
    fitted = (math.nan,) * 4
    if confidence_N is not None:
        fitted = _stump(confidence_N[finite_N].float(), a_N[finite_N], tokens, a * tokens, reduce)
    return Standing(
        tokens=tokens,
        trajectories=len(all_BX),
        replaying=replaying,
        stale=stale > 0,
        confidence=c,
        confidence_norm=normalised(torch.tensor(c, dtype=torch.float64), chance).item(),
        agreement=agreed,
        mean_abs=a,
        **dict(zip(("threshold", "share_below", "below", "above"), fitted, strict=True)),
        correlation=correlation,
        correlation_error=errors[5].item(),
        window=(math.exp(min(lows, default=math.nan)), math.exp(max(highs, default=math.nan))),
        free=free,
        replayed=replayed,
        fresh=fresh,
        replay_gain=replay_gain,
        replay_gain_error=errors[3].item(),
        fresh_gain=fresh_gain,
        fresh_gain_error=errors[4].item(),
    )


def _estimates(sums: Tensor, replaying: bool) -> Tensor:
    """[..., X] → acceptances, gains, correlation, means; see `standing_of` for the order."""
    trajectories, free, replayed, fresh, n, c, a, cc, aa, ca, agreed, stale = sums.unbind(-1)
    free, replayed, fresh = free / trajectories, replayed / trajectories, fresh / trajectories
    c, a, cc, aa, ca = (x / n for x in (c, a, cc, aa, ca))
    spread = ((cc - c * c) * (aa - a * a)).clamp_min(0)
    # A constant has no correlation, also where rounding leaves it a variance.
    spread = spread.where((cc - c * c > 1e-12 * cc) & (aa - a * a > 1e-12 * aa), torch.nan)
    correlation = (ca - c * a) / spread.sqrt()
    gains = (replayed - free, fresh - (replayed if replaying else free))
    return torch.stack([free, replayed, fresh, *gains, correlation, c, a, agreed / n, stale / n], -1)


def _stump(c_N: Tensor, a_N: Tensor, tokens: int, total: float, reduce: Reduce) -> tuple[float, float, float, float]:
    """(threshold, share of tokens below it, mean of a below, mean of a above) with the least squared error of a.

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


def as_json(standing: Standing) -> dict[str, Any]:
    """As a plain dict for JSON; NaN and infinities become null."""
    values = dataclasses.asdict(standing) | {"window": list(standing.window)}
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in values.items()}


def from_json(values: Mapping[str, Any]) -> Standing:
    """The inverse of `as_json`; null becomes NaN. KeyError if a field is missing; other keys are ignored."""
    found = {field.name: values[field.name] for field in dataclasses.fields(Standing)}
    low, high = found.pop("window")
    return Standing(window=(low, high), **{key: math.nan if x is None else x for key, x in found.items()})
