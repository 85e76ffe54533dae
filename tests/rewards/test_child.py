"""What the child makes of an item: the value of every part, their infos, and failures by name."""

from collections.abc import Callable
from typing import Any

import pytest

from rewards.base import Item, Reward
from rewards.child import score_item
from rewards.exact import score_exact
from rewards.format import score_format

ITEM: Item = {"prompt": "question", "completion": "<think></think>3", "answer": "3", "row": {"level": 2}}


def returns(result: Any) -> Callable[..., Any]:
    return lambda prompt, completion, answer, **row: result


def test_every_part_is_scored() -> None:
    parts = {"answer": Reward(score_exact), "form": Reward(score_format)}
    assert score_item(parts, ITEM) == {"parts": {"answer": 1.0, "form": 1.0}, "info": {"outcome": "ok"}}
    bare = score_item(parts, {**ITEM, "completion": "3"})
    assert bare["parts"] == {"answer": 1.0, "form": 0.0}


def test_what_a_function_returns_beside_its_value_is_kept_under_its_part_where_there_are_several() -> None:
    answer, form = Reward(returns((0.5, {"steps": [1, 2], "by": {3}}))), Reward(returns((1.0, {"steps": 7})))
    alone = score_item({"answer": answer}, ITEM)
    assert alone == {"parts": {"answer": 0.5}, "info": {"outcome": "ok", "steps": [1, 2], "by": "{3}"}}
    both = score_item({"answer": answer, "form": form}, ITEM)
    assert both["info"] == {"outcome": "ok", "answer/steps": [1, 2], "answer/by": "{3}", "form/steps": 7}


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (2.0, "ValueError: the reward 2.0 is outside its declared range [-1.0, 1.0]"),
        (float("nan"), "ValueError: the reward nan is outside"),
        (float("inf"), "ValueError: the reward inf is outside"),
        (1 + 1e-6, "outside its declared range"),
        (None, "TypeError"),
        ((0.5, 3), "TypeError"),
    ],
)
def test_a_part_that_fails_is_named_and_costs_the_whole_score(result: Any, words: str) -> None:
    parts = {"answer": Reward(score_exact), "odd": Reward(returns(result), -1.0, 1.0)}
    failed = score_item(parts, ITEM)
    assert failed["parts"] == {"answer": 0.0, "odd": -1.0}
    assert failed["info"]["outcome"] == "error"
    assert failed["info"]["message"].startswith("part odd: ")
    assert words in failed["info"]["message"]


@pytest.mark.parametrize(("value", "kept"), [(3 + 1e-12, 3.0), (-1 - 1e-12, -1.0), (0.1 + 0.2, 0.1 + 0.2)])
def test_a_value_beside_its_range_by_rounding_is_rounded(value: float, kept: float) -> None:
    assert score_item({"sum": Reward(returns(value), -1.0, 3.0)}, ITEM)["parts"] == {"sum": kept}
