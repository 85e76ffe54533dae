"""Which settings a program reads: attribute by attribute, while it works."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import mispo

ROOT = Path(mispo.__file__).parents[1]
READERS = tuple(str(ROOT / folder) for folder in ("mispo", "rollouts", "rewards", "model"))
WRITES_ALL = str(ROOT / "mispo" / "config")
"""Code that walks through every setting, to check, save or describe it: no use of one, but for properties of parts."""

Setting = tuple[str, str]
"""Class of the section or part, field."""


@contextmanager
def recorded(config: Any) -> Iterator[set[Setting]]:
    """The settings that the project's code reads inside; copies of a section count as the section."""
    seen: set[Setting] = set()
    classes = {type(section) for section in sections(config)}

    def instrument(section: type) -> None:
        def read(self: Any, name: str) -> Any:
            file = sys._getframe(1).f_code.co_filename
            answers = isinstance(getattr(type(self), sys._getframe(1).f_code.co_name, None), property)
            if file.startswith(READERS) and (answers or not file.startswith(WRITES_ALL)):
                seen.add((type(self).__name__, name))
            return object.__getattribute__(self, name)

        section.__getattribute__ = read  # type: ignore[method-assign, assignment]

    for section in classes:
        instrument(section)
    try:
        yield seen
    finally:
        for section in classes:
            del section.__getattribute__


def settings_of(config: Any) -> set[Setting]:
    """Every setting, section and part of a config, but for the name of a part, which is its class."""
    return {
        (type(section).__name__, declared.name)
        for section in sections(config)
        for declared in fields(section)
        if declared.init
    }


def sections(config: Any) -> Iterator[Any]:
    """The config, its sections, their parts and named entries."""
    yield config
    for declared in fields(config):
        value = getattr(config, declared.name)
        for inner in value.values() if isinstance(value, dict) else [value]:
            if is_dataclass(inner):
                yield from sections(inner)
