"""Ranges beside the field: `setting` declares them, `setting_problems` finds the values outside of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

NAME = re.compile(r"[A-Za-z0-9_-]+")
"""What an entry of a section of named entries, such as data.mixture, may be called."""


@dataclass(frozen=True)
class Limits:
    """What a value must be. In a list each number is within the range; None is always allowed where the type has it.

    null: what None does, for the message. needs: dotted key of the setting without which this one has no effect.
    test: a further check, value → problem or None.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: tuple[object, ...] = ()
    length: int | None = None
    finite: bool = True
    null: str = ""
    needs: str = ""
    test: Callable[[Any], str | None] | None = None


def setting(
    default: T,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    choices: Sequence[object] = (),
    length: int | None = None,
    finite: bool = True,
    null: str = "",
    needs: str = "",
    test: Callable[[Any], str | None] | None = None,
) -> T:
    """Declare a dataclass field with its default and its range.

    least, most: both ends included. above: end excluded. choices: the only values. length: of a list, whose numbers
    are each within the range. finite=False allows infinity. null, needs, test: see `Limits`.
    """
    limits = Limits(least, most, above, tuple(choices), length, finite, null, needs, test)
    metadata = {"limits": limits}
    if isinstance(default, list | dict):
        return cast(T, field(default_factory=lambda: deepcopy(default), metadata=metadata))
    return cast(T, field(default=default, metadata=metadata))


def around_one(bounds: Sequence[float]) -> str | None:
    """Check bounds [low, high] on a ratio of two policies: they must include 1, where the policies agree."""
    low, high = bounds
    if low > high:
        return f"must have its lower bound first (is {list(bounds)})"
    return None if low <= 1 <= high else f"must include 1, where both policies agree (is {list(bounds)})"


@dataclass(frozen=True)
class Leaf:
    """A setting of a config: dotted key, value, dataclass field, and the value that its class gives it."""

    key: str
    value: Any
    declared: Field[Any]

    @property
    def limits(self) -> Limits:
        """The declared range; without one, numbers must be finite."""
        return cast(Limits, self.declared.metadata.get("limits", Limits()))

    @property
    def default(self) -> Any:
        """The value that the class gives."""
        if self.declared.default_factory is not MISSING:
            return self.declared.default_factory()
        return self.declared.default


def leaves(config: Any, prefix: str = "") -> Iterator[Leaf]:
    """Walk the settings of a config dataclass; a free dictionary or an empty section of named entries is one leaf."""
    for declared in fields(config):
        key, value = f"{prefix}{declared.name}", getattr(config, declared.name)
        if is_dataclass(value):
            yield from leaves(value, f"{key}.")
        elif value and entry_class(type(config), declared.name):
            for name, entry in value.items():
                yield from leaves(entry, f"{key}.{name}.")
        else:
            yield Leaf(key, value, declared)


def changes(new: Any, old: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the settings in which a config differs from another one of the same class.

    Of a part that only the new one has: its name, and what differs from its own defaults. Of an entry that only the old
    one has: its key, with None.
    """
    for declared in fields(new):
        key, value, other = f"{prefix}{declared.name}", getattr(new, declared.name), getattr(old, declared.name)
        if is_dataclass(value):
            same = type(value) is type(other)
            if not same:
                yield f"{key}.name", getattr(value, "name", "")
            yield from changes(value, other if same else cast(Any, type(value))(), f"{key}.")
        elif entry_class(type(new), declared.name):
            for name, entry in value.items():
                where = f"{key}.{name}."
                yield from changes(entry, other[name], where) if name in other else keys_of(entry, where)
            yield from ((f"{key}.{name}", None) for name in other if name not in value)
        elif value != other:
            yield key, value


def keys_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting; a free dictionary is one."""
    return ((leaf.key, leaf.value) for leaf in leaves(config, prefix))


def types_of(section: type) -> Mapping[str, Any]:
    """The types of a section's fields, by name."""
    return _types_of(cast(Hashable, section))


@cache
def _types_of(section: Any) -> Mapping[str, Any]:
    hints = get_type_hints(section)
    return {declared.name: hints[declared.name] for declared in fields(section)}


def entry_class(section: type, name: str) -> type | None:
    """The dataclass of the entries of a field dict[str, Entry], None for any other field."""
    hint = types_of(section)[name]
    entry = get_args(hint)[1] if get_origin(hint) is dict else None
    return entry if isinstance(entry, type) and is_dataclass(entry) else None


def setting_problems(config: Any) -> Iterator[str]:
    """Find the settings that are outside of their range or have no effect: one message each, with key and fix."""
    found = {leaf.key: leaf for leaf in leaves(config)}
    for leaf in found.values():
        problem = _outside(leaf.value, leaf.limits)
        if problem:
            yield f"{leaf.key}: {problem}"
        needed = found.get(leaf.limits.needs)
        if needed and not needed.value and leaf.value != leaf.default:
            yield (
                f"{leaf.key}: has no effect with {needed.key}={_yaml(needed.value)}; leave it out, or set {needed.key}"
            )
    yield from _misnamed(config)


def _outside(value: Any, limits: Limits) -> str | None:
    """What is wrong with a value, None if nothing is."""
    if value is None:
        return None
    if limits.choices:
        return None if value in limits.choices else _not_chosen(value, limits.choices)
    numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int | float)]
    if limits.length in (None, len(numbers)) and all(_within(number, limits) for number in numbers):
        return limits.test(value) if limits.test else None
    each = f"{limits.length} numbers, each " if limits.length is not None else ""
    unbounded = limits.finite and not all(math.isfinite(number) for number in numbers)
    hint = f"; null {limits.null}" if limits.null else ""
    return f"must be {each}{'finite' if unbounded else _range(limits)} (is {value}){hint}"


def _within(number: float, limits: Limits) -> bool:
    return (
        not math.isnan(number)
        and (not limits.finite or math.isfinite(number))
        and (limits.least is None or number >= limits.least)
        and (limits.most is None or number <= limits.most)
        and (limits.above is None or number > limits.above)
    )


def _range(limits: Limits) -> str:
    if limits.least is not None and limits.most is not None:
        return f"between {limits.least:g} and {limits.most:g}"
    ends = ((limits.least, "at least"), (limits.above, "above"), (limits.most, "at most"))
    return " and ".join(f"{word} {end:g}" for end, word in ends if end is not None)


def _not_chosen(value: object, choices: tuple[object, ...]) -> str:
    if value == "False" and "off" in choices:
        return "YAML reads a bare off as false; write 'off', with its quotes"
    near = get_close_matches(str(value), [str(choice) for choice in choices], 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"must be one of {', '.join(map(str, choices))} (is {value!r}){hint}"


def _misnamed(config: Any, prefix: str = "") -> Iterator[str]:
    """Names of entries that no dotted key can reach."""
    for declared in fields(config):
        key, value = f"{prefix}{declared.name}", getattr(config, declared.name)
        if is_dataclass(value):
            yield from _misnamed(value, f"{key}.")
        elif entry_class(type(config), declared.name):
            for name in value:
                if not NAME.fullmatch(name):
                    yield f"{key}: a name must consist of letters, digits, _ and - (is {name!r})"


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
