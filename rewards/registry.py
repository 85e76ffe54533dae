"""Which rewards there are, and how several become one: a weighted sum of named parts."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from rewards.base import Reward
from rewards.exact import exact_reward
from rewards.format import format_reward
from rewards.gym import gym_reward

Builder = Callable[[str | None], Reward]
"""Makes a reward for a task, `data.task` (None without one). ValueError if the two do not fit."""

BUILDERS: dict[str, Builder] = {
    "gym": gym_reward,
    "exact": exact_reward,
    "format": format_reward,
}
"""Name → builder. A new reward is its file and a line here."""


@dataclass(frozen=True)
class PartSpec:
    """One term of the reward. name: of BUILDERS, or package.module:function. weight: ≥ 0; with 0 it is only logged."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class RewardSpec:
    """The reward Σ weight·part; plain data, sent to the child processes as JSON.

    parts: by a name that the user chooses. task: reasoning-gym's generator, for gym.
    ValueError that names reward.parts if there is none, or for a weight that is negative or not finite.
    """

    parts: Mapping[str, PartSpec]
    task: str | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("reward.parts: there is none; give at least one")
        for name, part in self.parts.items():
            if not 0 <= part.weight < math.inf:
                raise ValueError(f"reward.parts.{name}.weight: must be a number from 0 on (is {part.weight})")
        if not any(part.weight for part in self.parts.values()):
            raise ValueError("reward.parts: all weights are 0; give one of them a weight above 0")

    def total(self, values: Mapping[str, float]) -> float:
        """Return Σ weight·value.

        Rounding is monotone, so the total of values within the parts' ranges is never outside the total of the ranges.
        """
        first, *others = (part.weight * values[name] for name, part in self.parts.items())
        return sum(others, first)

    def to_json(self) -> str:
        """Write the spec as `from_json` reads it."""
        return json.dumps({"task": self.task, "parts": {name: vars(part) for name, part in self.parts.items()}})

    @staticmethod
    def from_json(text: str) -> RewardSpec:
        """Read a spec that `to_json` has written."""
        found = json.loads(text)
        return RewardSpec({name: PartSpec(**part) for name, part in found["parts"].items()}, found["task"])


def build_parts(spec: RewardSpec) -> dict[str, Reward]:
    """Build every part of a reward; ValueError that names reward.parts for an unknown name or task."""
    return {name: build_reward(f"reward.parts.{name}.name", part.name, spec.task) for name, part in spec.parts.items()}


def build_reward(key: str, name: str, task: str | None) -> Reward:
    """Build one reward by its name; ValueError that names the key if there is no such reward."""
    if ":" in name:
        return load_function(key, name)
    if name not in BUILDERS:
        near = get_close_matches(name, BUILDERS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{key}: no reward {name!r}{hint} (give {', '.join(BUILDERS)} or package.module:function)")
    return BUILDERS[name](task)


def load_function(key: str, name: str) -> Reward:
    """Load a user's score function, `package.module:function`; its range from attributes `low` and `high` (0, 1).

    ValueError that names the key if it does not import or is no function.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{key}: {name!r} does not import ({error}); give package.module:function, on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(f"{key}: {name!r} is not a function")
    return Reward(function, getattr(function, "low", 0.0), getattr(function, "high", 1.0))
