"""Shared by all tests: the slow ones come last, and child processes use one thread each."""

import os

import pytest
from hypothesis import settings

# The first example of a test also pays for imports and caches; a slow machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the hub, and some machines wait long for it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
