"""Exact quantiles over the values of all ranks, found with sums alone: no rank sends its values."""

from __future__ import annotations

import torch
from torch import Tensor

from mispo.algorithm.segments import Reduce

BITS = 32
MAGNITUDE = 2 ** (BITS - 1) - 1
"""All bits of a float32 but its sign."""


def quantiles(x_LN: Tensor, shares_C: Tensor, reduce: Reduce) -> Tensor:
    """Compute quantiles of each row over all ranks, [L, C] float32.

    The quantile of a share is the largest number below which at most this share of the row's values lies. x_LN: this
    rank's values, taken as float32; N may be 0 and differ between ranks, L may not. shares_C: in [0, 1). All quantiles
    are NaN if no rank has a value. The search goes bit by bit: 33 reductions of at most [L, C].
    """
    rows, device = len(x_LN), x_LN.device
    # Row by row, since a sort takes three times the memory of its values.
    sorted_LN = torch.stack([_ordered(row).sort().values for row in x_LN])
    tokens = int(reduce(torch.tensor(x_LN.shape[1], dtype=torch.int64)))
    allowed_C = (shares_C.double().to(device) * tokens).floor()
    found_LC = torch.full((rows, len(shares_C)), -MAGNITUDE - 1, dtype=torch.int64, device=device)
    for bit in reversed(range(BITS)):
        tried_LC = found_LC + 2**bit
        below_LC = reduce(torch.searchsorted(sorted_LN, tried_LC.to(torch.int32)))
        found_LC = torch.where(below_LC <= allowed_C, tried_LC, found_LC)
    values_LC = _ordered(found_LC.to(torch.int32).view(torch.float32)).view(torch.float32)
    return values_LC if tokens else torch.full_like(values_LC, torch.nan)


def _ordered(x: Tensor) -> Tensor:
    """Map float32 values to int32 in the same order: their bits, mirrored if negative. On bits it inverts itself."""
    bits = x.float().contiguous().view(torch.int32)
    return bits ^ ((bits >> (BITS - 1)) & MAGNITUDE)
