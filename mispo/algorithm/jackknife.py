"""Standard errors that know that the tokens of a trajectory are not independent: leave one trajectory out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def jackknife(sums_BS: Tensor, estimate: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(value [P], standard error [P]) of a statistic that is a function of sums over trajectories.

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
