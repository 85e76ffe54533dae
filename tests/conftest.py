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


LONG = (
    "test_interrupt",
    "test_loop",
    "test_updates",
    "test_methods",
    "test_cli",
    "test_learning",
    "test_attribution",
    "test_launchers",
)
"""Files that take a minute and more: behind all others, and so that two workers end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> tuple[bool, int]:
        return item.get_closest_marker("slow") is not None, LONG.index(item.path.stem) if item.path.stem in LONG else -1

    items.sort(key=place)
