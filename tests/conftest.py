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
    *("test_interrupt", "test_loop", "test_updates", "test_methods", "test_learning"),
    *("test_launchers", "test_cli", "test_attribution", "test_bootstrap"),
)
"""Files that start many runs: behind all others, the longest first, so that two workers end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else -1)
