"""All parts by group and name, and Hydra's groups of them."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from functools import reduce
from typing import cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from mispo.config.algorithm_parts import ADVANTAGES, CORRECTIONS, FILTERS, LOSSES
from mispo.config.parts import CRITICS, ENGINES, ENVIRONMENTS, OPTIMIZERS, Part
from mispo.config.schema import MispoConfig

PARTS: dict[str, tuple[type[Part], ...]] = {
    "environment": ENVIRONMENTS,
    "engine": ENGINES,
    "algorithm/filter": FILTERS,
    "algorithm/loss": LOSSES,
    "algorithm/correction": CORRECTIONS,
    "algorithm/advantage": ADVANTAGES,
    "critic": CRITICS,
    "optimizer": OPTIMIZERS,
}
"""Parts by Hydra group. The chosen one is at the group's dotted key: algorithm/filter → algorithm.filter."""

GROUPS = (
    *("recipe", "model", "data", "reward", "rollout", "algorithm", "trainer", "eval", "tracking"),
    *PARTS,
)
"""What a user chooses by GROUP=NAME: bundles of settings from recipes/, and parts."""


def part_name(part: type[Part]) -> str:
    """The name that chooses a part."""
    return str(next(declared for declared in fields(part) if declared.name == "name").default)


def chosen_part(config: MispoConfig, group: str) -> Part:
    """The part of a group that a config has."""
    return cast(Part, reduce(getattr, group.split("/"), config))


def place_part(config: MispoConfig, group: str, part: object) -> None:
    """Put a part into a config."""
    *sections, name = group.split("/")
    setattr(reduce(getattr, sections, config), name, part)


def find_part(group: str, name: str) -> type[Part]:
    """Find a part by group and name. ValueError with the nearest name for one that does not exist."""
    known = {part_name(part): part for part in PARTS[group]}
    if name not in known:
        raise ValueError(no_choice(group, name, list(known)))
    return known[name]


def no_choice(group: str, name: str, options: list[str]) -> str:
    """Say that a group has nothing of this name, and what it has."""
    near = get_close_matches(name, options, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{group}: no {group.rpartition('/')[2]} named {name!r}{hint} (there are {', '.join(options)})"


def register() -> None:
    """Give Hydra the schema, the default choices (`mispo_defaults`) and every part, for recipes/config.yaml.

    In the schema all parts are still missing, since merging a part into another one would keep the keys of both.
    """
    store, schema, defaults = ConfigStore.instance(), MispoConfig(), MispoConfig()
    chosen = [{f"/{group}": chosen_part(defaults, group).name} for group in PARTS]
    for group, parts in PARTS.items():
        place_part(schema, group, MISSING)
        for part in parts:
            store.store(group=group, name=part_name(part), node=part)
    store.store(name="mispo_schema", node=schema)
    store.store(name="mispo_defaults", node={"defaults": ["mispo_schema", *chosen]})
