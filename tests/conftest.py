"""Shared by all tests: those that start many runs come last, and child processes use one thread each."""

import os

import pytest
from hypothesis import settings

# The first example of a test also pays for imports and caches; a slow machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the hub, and some machines wait long for it


LONGEST = ("test_interrupt", "test_loop", "test_updates", "test_methods", "test_learning", "test_launchers", "test_cli")
"""Of the end-to-end files those that take longest: first among them, so that two workers end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "end_to_end":
            item.add_marker(pytest.mark.slow)
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    """Unit tests, then the end-to-end files."""
    if item.path.parent.name != "end_to_end":
        return -1
    return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
