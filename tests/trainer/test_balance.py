"""Prompts move between ranks until the work is even."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from mispo.trainer.balance import balanced, loads_of

COSTS = st.lists(st.floats(0, 100), min_size=1, max_size=40)


@given(costs=COSTS, ranks=st.integers(1, 5), seed=st.randoms())
def test_the_largest_load_never_grows_and_ends_within_one_thing_of_the_smallest(
    costs: list[float], ranks: int, seed: Random
) -> None:
    before = [seed.randrange(ranks) for _ in costs]
    after = balanced(costs, before, ranks)
    old, new = loads_of(costs, before, ranks), loads_of(costs, after, ranks)
    assert max(new) <= max(old) + 1e-9
    heaviest = [cost for cost, owner in zip(costs, after, strict=True) if owner == new.index(max(new)) and cost > 1e-5]
    assert not heaviest or max(new) - min(new) <= min(heaviest) + 1e-6


def test_what_is_even_stays_where_it_is() -> None:
    assert balanced([3.0, 3.0, 3.0, 3.0], [0, 0, 1, 1], 2) == [0, 0, 1, 1]


def test_few_things_move() -> None:
    """Three long prompts on one rank: one of them and nothing else goes to the other."""
    after = balanced([10.0, 10.0, 10.0, 1.0, 1.0, 8.0], [0, 0, 0, 1, 1, 1], 2)
    assert sum(after[i] != owner for i, owner in enumerate([0, 0, 0, 1, 1, 1])) == 1
    assert loads_of([10.0, 10.0, 10.0, 1.0, 1.0, 8.0], after, 2) == [20.0, 20.0]
