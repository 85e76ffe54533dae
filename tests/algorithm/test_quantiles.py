"""Quantiles over ranks against sorting, bit for bit."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mispo.algorithm.quantiles import quantiles
from support.threads import in_ranks

FLOATS = st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([0.0, -0.0, 0.5]))


@given(values=st.lists(FLOATS, min_size=1, max_size=40), share=st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_a_quantile_is_the_value_that_sorting_finds(values: list[float], share: float) -> None:
    x = torch.tensor([values, [-value for value in values]])
    found = quantiles(x, torch.tensor([share], dtype=torch.float64), lambda x: x)
    place = math.floor(share * len(values))
    assert found[:, 0].tolist() == x.sort(dim=1).values[:, place].tolist()


@pytest.mark.parametrize("cuts", [(0, 100), (1, 60), (100, 100)])
def test_ranks_find_the_quantiles_of_all_their_values(cuts: tuple[int, int]) -> None:
    x = torch.rand(3, 100, generator=torch.Generator().manual_seed(1))
    shares = torch.tensor([0.05, 0.1, 0.5, 0.95], dtype=torch.float64)
    parts = [x[:, : cuts[0]], x[:, cuts[0] : cuts[1]], x[:, cuts[1] :]]
    for found in in_ranks(3, lambda rank, reduce: quantiles(parts[rank], shares, reduce)):
        assert torch.equal(found, x.sort(dim=1).values[:, [5, 10, 50, 95]])
