"""From command-line overrides to a checked config, through Hydra's recipes; and from a run directory back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mispo.config.overrides import apply_overrides, first_line, unknown_key
from mispo.config.registry import GROUPS, PARTS, find_part, no_choice, place_part, register
from mispo.config.rules import check_config
from mispo.config.schema import MispoConfig
from mispo.config.setting import changes, entry_class

FIXED = ("model.", "warm_start.", "seed", "run_dir", "critic.model")
"""Keys, or beginnings of keys, that a resumed run cannot change."""

FIXED_PARTS = ("algorithm/advantage", "critic", "optimizer")
"""Groups whose choice a resumed run cannot change."""

MARK = "\ue000"
"""A character for private use: breaks up what OmegaConf would take for an interpolation or a missing value."""


RARE_BREAKS = "\x85\u2028\u2029"
"""What YAML takes for a line break, beside carriage return and newline."""


def load_config(overrides: Sequence[str], config_dir: Path | None = None) -> MispoConfig:
    """Compose the config of a run. ValueError with the nearest valid name for one that does not exist.

    overrides: Hydra overrides, without sweeps. config_dir: a directory with the user's own groups, for example
    DIR/recipe/mine.yaml; it is searched after the built-in ones.
    """
    parsed = parse_overrides(overrides)
    choices = [str(override.input_line) for override in parsed if _is_choice(override)]
    if config_dir is not None and not config_dir.is_dir():
        raise ValueError(f"--config-dir: no directory {str(config_dir)!r}")
    tree = _compose(choices, config_dir)
    return _checked(tree, [override for override in parsed if not _is_choice(override)])


def config_from_file(path: Path, overrides: Sequence[str]) -> MispoConfig:
    """Read the config that a run wrote into its directory, with overrides on top: keys and parts, no recipes.

    ValueError for a file that is no config, and for what a resumed run cannot change.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; this is no run directory")
    parsed = parse_overrides(overrides)
    for override in parsed:
        _check_resumable(override)
    saved = _read(path)
    for override in parsed:
        if _is_choice(override):
            _choose(saved, override.key_or_group, str(override.value()))
    try:
        tree = OmegaConf.merge(OmegaConf.structured(_with_parts_of(saved)), _texts(saved, _hide))
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise ValueError(f"{path}: {_unknown(error)}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error.full_key}: {first_line(error)}") from error
    assert isinstance(tree, DictConfig)
    config = _checked(tree, [override for override in parsed if not _is_choice(override)])
    _reveal(config)
    return config


def save_config(config: MispoConfig, path: Path) -> None:
    """Write every key with its value, as YAML that `config_from_file` reads back to an equal config."""
    path.write_text(config_yaml(config), encoding="utf-8")


def config_yaml(config: MispoConfig) -> str:
    """Every key with its value, as YAML."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes texts with rare line breaks in double quotes; in other styles PyYAML does not read them back."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(mark in text for mark in RARE_BREAKS) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """ValueError that shows the one that is not of the form key=value."""
    try:
        return list(OverridesParser.create().parse_overrides(list(overrides)))
    except HydraException as error:
        raise ValueError(
            f"overrides: {str(error).splitlines()[0]}; the form is key=value, and a text with special characters "
            "needs inner quotes: 'data.prompt=\"{question}\"'"
        ) from error


def is_sweep(overrides: Sequence[str]) -> bool:
    """Whether any override names several values."""
    return any(override.is_sweep_override() for override in parse_overrides(overrides))


def recipe_of(overrides: Sequence[str]) -> str:
    """The recipe that the overrides choose."""
    chosen = [o.value() for o in parse_overrides(overrides) if o.key_or_group == "recipe"]
    return str(chosen[-1]) if chosen else "quickstart"


def changed_keys(config: MispoConfig, before: MispoConfig | None = None) -> Mapping[str, Any]:
    """Settings that differ from another config, or from the class defaults (see `changes`)."""
    return dict(changes(config, before or MispoConfig()))


def _is_choice(override: Override) -> bool:
    return override.key_or_group in GROUPS and not isinstance(override.value(), dict)


def _compose(choices: Sequence[str], config_dir: Path | None) -> DictConfig:
    """The typed config of recipes and parts, before single keys are set."""
    register()
    if config_dir is not None:
        choices = [*choices, f"hydra.searchpath=[file://{config_dir.resolve()}]"]
    try:
        with initialize_config_module("recipes", version_base="1.3"):
            return compose("config", overrides=list(choices))
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        raise ValueError(no_choice(group, name, [str(option) for option in error.options or []])) from error
    except HydraException as error:
        raise ValueError(_reason(error)) from error


def _checked(tree: DictConfig, overrides: Sequence[Override]) -> MispoConfig:
    """The config with single keys set, if it is sound."""
    apply_overrides(tree, overrides)
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {first_line(error)}") from error
    assert isinstance(config, MispoConfig)
    check_config(config)
    return config


def _reason(error: HydraException) -> str:
    """Why recipes do not fit together, in one line, and which of them is at fault."""
    lines = str(error).splitlines()
    recipe = re.match(r"In '(.+)': ", lines[0])
    where = f" (in {recipe[1]})" if recipe else ""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return f"{_unknown(cause)}{where}"
    if isinstance(cause, OmegaConfBaseException) and cause.full_key in GROUPS:
        return f"{cause.full_key}: no recipe is built in; give --config-dir a directory with {cause.full_key}/NAME.yaml"
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {first_line(cause)}{where}"
    return " ".join(lines[:2])


def _unknown(error: OmegaConfBaseException) -> str:
    key = str(error.full_key)
    return unknown_key(key, error.object_type or MispoConfig, key[: key.rfind(".") + 1])


def _check_resumable(override: Override) -> None:
    key = override.key_or_group
    if key in GROUPS and (key not in PARTS or not _is_choice(override)):
        raise ValueError(f"{key}: a resumed run keeps its recipes; override single keys")
    if key in FIXED_PARTS or f"{key}.".startswith("warm_start.") or key.startswith(FIXED):
        raise ValueError(f"{key}: is fixed when a run begins; leave it out, or start a new run")


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is no YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: is no config; it must have sections such as `trainer:`")
    return saved


def _choose(saved: dict[str, Any], group: str, name: str) -> None:
    """Replace a part in what a run saved, unless it is the same."""
    find_part(group, name)
    *sections, last = group.split("/")
    section = saved
    for inner in sections:
        section = section.setdefault(inner, {})
    if section.get(last, {}).get("name") != name:
        section[last] = {"name": name}


def _with_parts_of(saved: Mapping[str, Any]) -> MispoConfig:
    """A default config with the parts that a saved one names."""
    config = MispoConfig()
    for group in PARTS:
        node: Any = saved
        for name in group.split("/"):
            node = node.get(name) if isinstance(node, dict) else None
        if isinstance(node, dict) and "name" in node:
            place_part(config, group, find_part(group, str(node["name"]))())
    return config


def _hide(text: str) -> str:
    """Put MARK into what OmegaConf would not take literally."""
    return f"{MARK}???" if text == "???" else text.replace(MARK, 2 * MARK).replace("${", f"${MARK}{{")


def _show(text: str) -> str:
    """Undo `_hide`."""
    return re.sub(f"{MARK}(.)", r"\1", text, flags=re.DOTALL)


def _texts(value: Any, change: Callable[[str], str]) -> Any:
    """A plain value with every text in it changed."""
    if isinstance(value, dict):
        return {key: _texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _reveal(config: Any) -> None:
    """Undo `_hide` in every setting, in place."""
    for declared in fields(config):
        value = getattr(config, declared.name)
        if is_dataclass(value):
            _reveal(value)
        elif entry_class(type(config), declared.name):
            for entry in value.values():
                _reveal(entry)
        else:
            setattr(config, declared.name, _texts(value, _show))
