"""Where the mismatch comes from: shares of the variance of log x, by cause, and how much of each goes through routing.

log x telescopes into parts, for example stale weights, precision and the rest: log x = Σ_i part_i, token by token. The
share of part i is Cov(part_i, log x)/Var(log x) over the generated tokens; the shares add up to 1, and one is negative
where a part cancels others. Each part is also measured with the rollout's routing replayed in the trainer: what then
vanishes, Cov(part_i − replayed_i, log x)/Var(log x), is mediated by routing. This is a second column about the same
parts and not another part, since staleness and precision act partly *through* the router. Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mispo.algorithm.segments import segment_sum

IDENTICAL = 1e-12
"""Var(log x) below this share of its mean square is rounding: log x is constant."""


@dataclass(frozen=True)
class Part:
    """One part of log x.

    share: of Var(log x). mediated: the share that vanishes when routing is replayed; NaN if that was not measured.
    Each with a standard error by jackknife over trajectories. mean, rms: of the part itself, nats per token.
    """

    share: float
    share_error: float
    mediated: float
    mediated_error: float
    mean: float
    rms: float


@dataclass(frozen=True)
class Attribution:
    """Mismatch by cause, over the tokens of all ranks.

    parts: by name, in the caller's order. mediated, mediated_error: of all parts together. variance: Var(log x), nats².
    k1, k3: KL(π_rollout ‖ π_old) in nats per token, as in mismatch/k1 and mismatch/k3. tokens: how many count;
    left_out: how many have a log x that is not finite. trajectories: how many have a token that counts. replayed:
    whether the mediated columns were measured. identical: log x does not vary, so there are no shares (all NaN).
    Without a token every number is NaN.
    """

    parts: Mapping[str, Part]
    mediated: float
    mediated_error: float
    variance: float
    k1: float
    k3: float
    tokens: int
    left_out: int
    trajectories: int
    replayed: bool
    identical: bool


def attribute(
    parts: Mapping[str, Tensor],
    replayed: Mapping[str, Tensor] | None,
    offsets_B1: Tensor,
    everyone: Callable[[Tensor], Tensor],
) -> Attribution:
    """Compute the shares of the parts [N] of this rank's log x, over all ranks.

    parts: name → part of log x [N]; they add up to log x. replayed: the same parts with the rollout's routing replayed,
    by the same names; None = not measured. everyone: this rank's [B, …] → all ranks' [total, …], called once.
    """
    parts_PN = torch.stack([part_N.double() for part_N in parts.values()])
    log_x_N = parts_PN.sum(0)
    if replayed is None:
        mediated_PN = torch.full_like(parts_PN, torch.nan)
    else:
        assert parts.keys() == replayed.keys(), f"parts {list(parts)}, but replayed {list(replayed)}"
        mediated_PN = parts_PN - torch.stack([replayed[name].double() for name in parts])
    finite_N = parts_PN.isfinite().all(0)
    if replayed is not None:
        finite_N &= mediated_PN.isfinite().all(0)
    columns_XN = torch.cat(
        [
            torch.stack([torch.ones_like(log_x_N), log_x_N, log_x_N.square(), log_x_N.exp() - 1 - log_x_N]),
            parts_PN,
            parts_PN * log_x_N,
            parts_PN.square(),
            mediated_PN,
            mediated_PN * log_x_N,
        ]
    ).where(finite_N, 0)
    columns_XN = torch.cat([columns_XN, (~finite_N).double()[None]])
    # A column at a time: an index_add over [X, N] would hold a copy of all of them.
    sums_BX = everyone(torch.stack([segment_sum(column_N, offsets_B1) for column_N in columns_XN], 1))
    return _from_sums(list(parts), sums_BX.cpu(), replayed is not None)


def _from_sums(names: list[str], sums_BX: Tensor, replayed: bool) -> Attribution:
    """Make the record from sums over each trajectory.

    sums_BX: n, Σy, Σy², Σk3, then for each part Σp, Σpy, Σp², Σm, Σmy, then the tokens left out; y = log x.
    """
    count = len(names)
    left_out, sums_BX = int(sums_BX[:, -1].sum()), sums_BX[sums_BX[:, 0] > 0, :-1]
    shares, errors = jackknife(sums_BX, lambda sums: _shares(sums, count))
    total_X = sums_BX.sum(0)
    _, y, yy, k3 = (total_X[:4] / total_X[0]).tolist()
    variance = yy - y * y
    means, squares = total_X[4 : 4 + count] / total_X[0], total_X[4 + 2 * count : 4 + 3 * count] / total_X[0]
    columns = [shares[:count], errors[:count], shares[count:-1], errors[count:-1], means, squares.sqrt()]
    rows = torch.stack(columns, 1).tolist()
    return Attribution(
        parts={name: Part(*row) for name, row in zip(names, rows, strict=True)},
        mediated=shares[-1].item(),
        mediated_error=errors[-1].item(),
        variance=max(variance, 0.0),
        k1=-y,
        k3=k3,
        tokens=int(total_X[0]),
        left_out=left_out,
        trajectories=len(sums_BX),
        replayed=replayed,
        identical=bool(variance <= IDENTICAL * yy),
    )


def _shares(sums: Tensor, count: int) -> Tensor:
    """Return shares of the parts, mediated shares, and the sum of the latter: [..., X] → [..., 2·count + 1]."""
    means = sums / sums[..., :1]
    y, yy = means[..., 1:2], means[..., 2:3]
    part, part_y, _, mediated, mediated_y = means[..., 4:].split(count, -1)
    variance = yy - y.square()
    variance = variance.where(variance > IDENTICAL * yy, torch.nan)
    covariances = torch.cat([part_y - part * y, mediated_y - mediated * y], -1)
    shares = covariances / variance
    return torch.cat([shares, shares[..., count:].sum(-1, keepdim=True)], -1)


def jackknife(sums_BS: Tensor, estimate: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return (value [P], standard error [P]) of a statistic that is a function of sums over trajectories.

    Trajectories are left out, not tokens, since the tokens of a trajectory are not independent.

    sums_BS: each trajectory's part of the S sums, float64, one row per trajectory that has tokens. estimate:
    sums [..., S] → statistic [..., P], in one call for all B leave-one-out sums. The error is NaN with fewer than two
    trajectories, and where leaving one out leaves the statistic undefined. Source: Efron & Stein 1981, by clusters.
    """
    total_S = sums_BS.sum(0)
    count = len(sums_BS)
    value_P = estimate(total_S)
    if count < 2:
        return value_P, torch.full_like(value_P, torch.nan)
    left_out_BP = estimate(total_S - sums_BS)
    spread_P = (left_out_BP - left_out_BP.mean(0)).square().sum(0)
    return value_P, (spread_P * (count - 1) / count).sqrt()
