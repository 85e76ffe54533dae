"""A weighted sum of named parts: its arithmetic, and what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.registry import BUILDERS, PartSpec, RewardSpec, build_parts

numbers = st.floats(-1e6, 1e6)
terms = st.lists(st.tuples(st.floats(0, 1e3), numbers, numbers, st.floats(0, 1)), min_size=1, max_size=5)


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_one_part_of_weight_1_is_the_reward_bit_for_bit(value: float) -> None:
    total = RewardSpec({"task": PartSpec("exact")}).total({"task": value})
    assert (total, math.copysign(1, total)) == (value, math.copysign(1, value))


def test_the_reward_is_the_weighted_sum() -> None:
    spec = RewardSpec({"answer": PartSpec("exact", 0.75), "form": PartSpec("format", 0.25), "seen": PartSpec("gym", 0)})
    assert spec.total({"form": 1.0, "answer": -2.0, "seen": 1e9}) == -1.25


@given(terms=terms)
def test_rounding_never_leaves_the_range(terms: list[tuple[float, float, float, float]]) -> None:
    if not any(weight for weight, *_ in terms):
        return
    spec = RewardSpec({str(n): PartSpec("exact", weight) for n, (weight, *_) in enumerate(terms)})
    low = {str(n): min(a, b) for n, (_, a, b, _) in enumerate(terms)}
    high = {str(n): max(a, b) for n, (_, a, b, _) in enumerate(terms)}
    inside = {
        str(n): min(max(low[str(n)] + share * (high[str(n)] - low[str(n)]), low[str(n)]), high[str(n)])
        for n, (_, _, _, share) in enumerate(terms)
    }
    assert spec.total(low) <= spec.total(inside) <= spec.total(high)


def test_a_spec_travels_as_json() -> None:
    spec = RewardSpec({"a": PartSpec("exact", 0.1), "b": PartSpec("verifiers:length")}, task="count_bits")
    assert RewardSpec.from_json(spec.to_json()) == spec


def test_every_reward_of_the_table_builds_for_a_task() -> None:
    spec = RewardSpec({name: PartSpec(name) for name in BUILDERS}, "count_bits")
    for name, part in build_parts(spec).items():
        value = part.score("How many 1 bits?", "<think>7</think>3", "3", number=7)
        assert (name, value) == (name, 1.0)
        assert (part.low, part.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, r"reward\.parts: there is none"),
        ({"a": PartSpec("exact", -0.5)}, r"reward\.parts\.a\.weight: must be a number from 0 on \(is -0\.5\)"),
        ({"a": PartSpec("exact", math.nan)}, r"reward\.parts\.a\.weight: .* \(is nan\)"),
        ({"a": PartSpec("exact", math.inf)}, r"reward\.parts\.a\.weight: .* \(is inf\)"),
        ({"a": PartSpec("exact", 0.0)}, "all weights are 0"),
    ],
)
def test_a_sum_that_means_nothing_is_refused(parts: dict[str, PartSpec], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RewardSpec(parts)
