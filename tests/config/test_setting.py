"""Ranges beside the field: each kind of range refuses what is outside of it, and says what is allowed."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from mispo.config import schema
from mispo.config.registry import PARTS
from mispo.config.schema import MispoConfig
from mispo.config.setting import around_one, changes, keys_of, leaves, setting, setting_problems


@dataclass
class Entry:
    share: float = setting(0.5, least=0, most=1)


@dataclass
class Section:
    count: int = setting(1, least=1)
    rate: float = setting(0.1, above=0)
    discount: float = setting(1.0, above=0, most=1)
    plain: float = 0.0
    cap: float = setting(2.0, above=0, finite=False)
    clip: float | None = setting(None, above=0, null="switches it off")
    word: str = setting("auto", choices=("auto", "online", "off"))
    stage: int = setting(0, choices=(0, 1, 2))
    pair: list[float] = setting([0.5, 2.0], length=2, above=0, test=around_one)  # noqa: RUF009
    on: bool = False
    rounds: int = setting(10, least=1, needs="on")
    entries: dict[str, Entry] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "count: must be at least 1 (is 0)"),
        ("rate", 0.0, "rate: must be above 0 (is 0.0)"),
        ("rate", math.inf, "rate: must be finite (is inf)"),
        ("rate", math.nan, "rate: must be finite (is nan)"),
        ("plain", math.inf, "plain: must be finite (is inf)"),
        ("discount", 1.5, "discount: must be above 0 and at most 1 (is 1.5)"),
        ("cap", math.nan, "cap: must be above 0 (is nan)"),
        ("clip", -1.0, "clip: must be above 0 (is -1.0); null switches it off"),
        ("word", "onlin", "word: must be one of auto, online, off (is 'onlin'); did you mean online?"),
        ("word", "False", "word: YAML reads a bare off as false; write 'off', with its quotes"),
        ("stage", 3, "stage: must be one of 0, 1, 2 (is 3)"),
        ("pair", [0.5], "pair: must be 2 numbers, each above 0 (is [0.5])"),
        ("pair", [0.0, 2.0], "pair: must be 2 numbers, each above 0 (is [0.0, 2.0])"),
        ("pair", [0.5, math.inf], "pair: must be 2 numbers, each finite (is [0.5, inf])"),
        ("pair", [2.0, 0.5], "pair: must have its lower bound first (is [2.0, 0.5])"),
        ("pair", [1.1, 2.0], "pair: must include 1, where both policies agree (is [1.1, 2.0])"),
        ("rounds", 3, "rounds: has no effect with on=false; leave it out, or set on"),
        ("entries", {"a": Entry(1.5)}, "entries.a.share: must be between 0 and 1 (is 1.5)"),
        ("entries", {"a.b": Entry()}, "entries: a name must consist of letters, digits, _ and - (is 'a.b')"),
    ],
)
def test_a_value_outside_of_its_range_is_named_with_what_is_allowed(name: str, value: Any, message: str) -> None:
    section = Section()
    setattr(section, name, value)
    assert list(setting_problems(section)) == [message]


@pytest.mark.parametrize(
    ("name", "value"),
    [("count", 1), ("discount", 1.0), ("cap", math.inf), ("clip", None), ("pair", [1.0, 1.0]), ("stage", 2)],
)
def test_the_ends_of_a_range_are_within_it(name: str, value: Any) -> None:
    section = Section()
    setattr(section, name, value)
    assert list(setting_problems(section)) == []


def test_a_setting_that_needs_another_one_is_accepted_with_it() -> None:
    assert list(setting_problems(Section(on=True, rounds=3))) == []


def test_all_problems_are_found_at_once() -> None:
    assert len(list(setting_problems(Section(count=0, rate=-1.0, word="x")))) == 3


def test_defaults_are_not_shared_between_configs() -> None:
    Section().pair.append(3.0)
    assert Section().pair == [0.5, 2.0]


def test_keys_are_dotted_names_down_to_entries_and_parts() -> None:
    keys = dict(keys_of(MispoConfig()))
    assert keys["algorithm.filter.token_bounds"] == [0.5, 2.0]
    assert keys["algorithm.filter.name"] == "bounds"
    assert keys["reward.parts.task.name"] == "gym"
    assert keys["data.task_args"] == {}
    assert keys["data.mixture"] == {}
    assert keys["seed"] == 0


def test_changes_know_entries_that_came_and_went() -> None:
    new, old = Section(entries={"a": Entry(0.2), "b": Entry()}), Section(entries={"a": Entry(), "c": Entry()})
    assert dict(changes(new, old)) == {"entries.a.share": 0.2, "entries.b.share": 0.5, "entries.c": None}


def everything() -> list[Any]:
    """One of each section and part."""
    sections = [getattr(schema, name) for name in dir(schema) if name.endswith("Config")]
    return [kind() for kind in (*sections, *(part for parts in PARTS.values() for part in parts))]


def test_every_default_is_within_its_range() -> None:
    for config in everything():
        assert list(setting_problems(config)) == [], type(config).__name__


def test_every_setting_that_needs_another_names_one_that_exists() -> None:
    keys = dict(keys_of(MispoConfig()))
    needed = {leaf.limits.needs for leaf in leaves(MispoConfig())} - {""}
    assert needed == {
        "model.lora.rank",
        "model.mtp",
        "algorithm.kl",
        "algorithm.dynamic_sampling",
        "algorithm.overlong.share",
    }
    assert needed <= set(keys)


def test_every_number_has_a_range() -> None:
    """Except seeds and weights of a sum, which may be any number."""
    free = {"DataConfig.seed", "MispoConfig.seed", "RewardPartConfig.weight"}
    for config in everything():
        for declared in dataclasses.fields(config):
            if declared.type in ("int", "float", "float | None", "int | None", "list[float]"):
                limits = declared.metadata.get("limits")
                name = f"{type(config).__name__}.{declared.name}"
                ranged = limits and (limits.least, limits.above, limits.choices) != (None, None, ())
                assert ranged or name in free, name
