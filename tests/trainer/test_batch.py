"""How trajectories are cut into micro-batches, and where the model reads them."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mispo.trainer.batch import FORWARDS_OF_ONE, Layout, least_padding
from support.batches import batch_of

CPU = torch.device("cpu")


def test_padded_parts_are_sorted_by_length_and_count_their_padding() -> None:
    parts = Layout(20).microbatches(batch_of([4, 10, 5, 10, 4, 4]), range(6))
    assert parts == [[1, 3], [2], [0, 4, 5]]


def test_a_further_forward_is_worth_it_where_it_saves_padding() -> None:
    assert least_padding([100, 100, 10, 10, 10], 500) == [[0, 1], [2, 3, 4]]
    assert least_padding([100, 100, 99, 98, 97], 500) == [[0, 1, 2, 3, 4]]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9), tokens=st.integers(20, 200))
def test_no_other_cut_has_less_padding(lengths: list[int], tokens: int) -> None:
    lengths = sorted(lengths, reverse=True)

    def cost(parts: list[list[int]]) -> float:
        return sum(lengths[part[0]] * len(part) + tokens / FORWARDS_OF_ONE for part in parts)

    def fits(part: list[int]) -> bool:
        return len(part) == 1 or lengths[part[0]] * len(part) <= tokens

    everything = list(range(len(lengths)))
    cuts = [
        [everything[a:b] for a, b in pairwise([0, *chosen, len(lengths)])]
        for size in range(len(lengths))
        for chosen in combinations(everything[1:], size)
    ]
    found = least_padding(lengths, tokens)
    assert [i for part in found for i in part] == everything
    assert all(map(fits, found))
    assert cost(found) == pytest.approx(min(cost(parts) for parts in cuts if all(map(fits, parts))))


def test_packed_parts_are_filled_first_fit_and_longest_first() -> None:
    parts = Layout(20, packed=True).microbatches(batch_of([4, 10, 5, 9, 3, 4]), range(6))
    assert parts == [[1, 3], [2, 0, 5, 4]]
    parts = Layout(21, packed=True).microbatches(batch_of([4, 10, 5, 8, 3, 4]), range(6))
    assert parts == [[1, 3, 4], [2, 0, 5]]


def test_a_trajectory_longer_than_the_budget_stands_alone() -> None:
    for packed in (False, True):
        assert Layout(6, packed).microbatches(batch_of([4, 10, 3]), range(3)) == [[1], [0], [2]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("members", [[2, 0], [1], [0, 1, 2]])
def test_each_scored_token_is_read_where_its_predecessor_lies(packed: bool, members: list[int]) -> None:
    batch = batch_of([4, 7, 5])
    x = Layout(100, packed).input(batch, members, CPU)
    expected = torch.cat([batch.ids[b][2:] for b in members])
    assert x.targets.tolist() == expected.tolist()
    assert x.ids[x.rows, x.columns].tolist() == (expected - 1).tolist()
    end = Layout(100, packed).input(batch, members, CPU, last=True)
    assert end.ids[end.rows, end.columns].tolist() == [int(batch.ids[b][-1]) for b in members]


def test_packed_positions_restart_and_nothing_is_padding() -> None:
    x = Layout(100, packed=True).input(batch_of([4, 3]), [1, 0], CPU)
    assert x.ids.tolist() == [[100, 101, 102, 0, 1, 2, 3]]
    assert isinstance(x.positions, Tensor)
    assert x.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert Layout(100).input(batch_of([4, 3]), [1, 0], CPU).positions is None


@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_micro_batch_is_one_token_of_which_nothing_is_read(packed: bool) -> None:
    x = Layout(100, packed).input(batch_of([4]), [], CPU)
    assert x.ids.shape == (1, 1)
    assert len(x.rows) == len(x.columns) == len(x.targets) == 0
