"""From command-line overrides to a checked config, through Hydra's recipes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mispo.config.check import check_config
from mispo.config.schema import MispoConfig

FIXED = (
    "model.",
    "warm_start.",
    "seed",
    "run_dir",
    "algorithm.advantage",
    "trainer.optimizer",
    "critic.kind",
    "critic.model",
)
"""Keys, or beginnings of keys, that a resumed run cannot change."""

GROUPS = ("model", "data", "reward", "rollout", "algorithm", "trainer", "tracking")
"""Hydra groups of recipes/; `recipe` overlays all of them."""


def load_config(overrides: Sequence[str], config_dir: Path | None = None) -> MispoConfig:
    """The config of a run. ValueError with the nearest valid name for whatever does not exist.

    overrides: Hydra overrides, without sweeps. config_dir: a directory with the user's own groups, for example
    DIR/recipe/mine.yaml; it is searched after the built-in ones.
    """
    parsed = parse_overrides(overrides)
    for override in parsed:
        _check_key(override)
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ValueError(f"--config-dir: no directory {str(config_dir)!r}")
        overrides = [*overrides, f"hydra.searchpath=[file://{config_dir.resolve()}]"]
    ConfigStore.instance().store(name="mispo_defaults", node=MispoConfig)
    try:
        with initialize_config_module("recipes", version_base="1.3"):
            composed = compose("config", overrides=list(overrides))
        config = OmegaConf.to_object(composed)
    except MissingConfigException as error:
        raise ValueError(_missing_choice(error)) from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error.msg or error).splitlines()[0]}") from error
    except HydraException as error:
        raise ValueError(_reason(error)) from error
    assert isinstance(config, MispoConfig)
    check_config(config)
    return config


def config_from_file(path: Path, overrides: Sequence[str]) -> MispoConfig:
    """The config that a run wrote into its directory, with overrides on top (no groups)."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; this is no run directory")
    parsed = parse_overrides(overrides)
    for override in parsed:
        if override.key_or_group in (*GROUPS, "recipe"):
            raise ValueError(f"{override.key_or_group}: a resumed run keeps its recipes; override single keys")
        if override.key_or_group.startswith(FIXED):
            raise ValueError(f"{override.key_or_group}: was settled when the run began; leave it out, or start anew")
        _check_key(override)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(MispoConfig), OmegaConf.load(path))
        for override in parsed:
            OmegaConf.update(merged, override.key_or_group, override.value())
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error.full_key}: {str(error.msg or error).splitlines()[0]}") from error
    assert isinstance(config, MispoConfig)
    check_config(config)
    return config


def save_config(config: MispoConfig, path: Path) -> None:
    """Every key with its value, as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """All combinations of a sweep such as seed=0,1,2, each a list of plain overrides."""
    choices = [
        [f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in parse_overrides(overrides)
    ]
    return [[str(part) for part in job] for job in itertools.product(*choices)]


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """ValueError that shows the one that is not of the form key=value."""
    try:
        return list(OverridesParser.create().parse_overrides(list(overrides)))
    except HydraException as error:
        raise ValueError(
            f"overrides: {str(error).splitlines()[0]}; the form is key=value, and a text with special characters "
            "needs quotes of its own: 'data.prompt=\"{question}\"'"
        ) from error


def is_sweep(overrides: Sequence[str]) -> bool:
    """Whether any override names several values."""
    return any(override.is_sweep_override() for override in parse_overrides(overrides))


def recipe_of(overrides: Sequence[str]) -> str:
    """The recipe that the overrides choose."""
    chosen = [o.value() for o in parse_overrides(overrides) if o.key_or_group == "recipe"]
    return str(chosen[-1]) if chosen else "quickstart"


def keys_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; a free dictionary is one leaf."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from keys_of(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def changed_keys(config: MispoConfig, before: MispoConfig | None = None) -> Mapping[str, Any]:
    """Leaves that differ from another config, or from the class defaults."""
    others = dict(keys_of(before or MispoConfig()))
    return {key: value for key, value in keys_of(config) if value != others[key]}


def _check_key(override: Override) -> None:
    known = dict(keys_of(MispoConfig()))
    sections = {key.rpartition(".")[0] for key in known} - {""}
    key = override.key_or_group
    if key in known or key in (*GROUPS, "recipe") or key.startswith("data.task_args."):
        return
    if key in sections:
        return
    near = get_close_matches(key, [*known, *GROUPS, "recipe"], 1, cutoff=0.5)
    last = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    hint = (last or near)[:1]
    raise ValueError(f"{key}: no such key{f'; did you mean {hint[0]}?' if hint else ''}")


def _missing_choice(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    options = [str(option) for option in error.options or []]
    near = get_close_matches(name, options, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{group}: no {group} named {name!r}{hint} (there are {', '.join(options)})"


def _reason(error: HydraException) -> str:
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause.msg or cause).splitlines()[0]}"
    return str(error).splitlines()[0]
