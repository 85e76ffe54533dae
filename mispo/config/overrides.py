"""Overrides `key=value` on a composed config, and what is answered to a key that does not exist."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, cast, get_origin

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mispo.config.parts import Part
from mispo.config.registry import GROUPS, PARTS, part_name
from mispo.config.schema import MispoConfig
from mispo.config.setting import entry_class, keys_of, types_of


def apply_overrides(tree: DictConfig, overrides: Sequence[Override]) -> None:
    """Set values in a typed config, in place. ValueError with one line per key or value that does not fit."""
    OmegaConf.set_struct(tree, False)
    problems: list[str] = []
    for override in overrides:
        key = override.key_or_group
        if override.is_delete():
            problems += _remove(tree, key)
        else:
            problems += _assign(tree, MispoConfig, "", key.split("."), override.value())
    if problems:
        raise ValueError("\n".join(problems))


def _remove(tree: DictConfig, key: str) -> Iterator[str]:
    parent, _, name = key.rpartition(".")
    entries = OmegaConf.select(tree, parent) if parent else None
    if isinstance(entries, DictConfig) and OmegaConf.get_type(entries) is dict and name in entries:
        del entries[name]
    else:
        yield f"{key}: cannot be removed; ~ takes named entries away, such as ~reward.parts.NAME"


def _assign(node: DictConfig, section: type, prefix: str, names: Sequence[str], value: Any) -> Iterator[str]:
    """Set one value below `node`, whose class is `section`. Yields what is wrong with it."""
    name, *rest = names
    key, asked = f"{prefix}{name}", prefix + ".".join(names)
    if name not in types_of(section):
        yield unknown_key(asked, section, prefix, value)
        return
    hint = types_of(section)[name]
    if entry_class(section, name):
        yield from _assign_entries(node, section, key, names, value)
    elif is_dataclass(hint):
        child = cast(type, OmegaConf.get_type(node, name))
        if rest:
            yield from _assign(node[name], child, f"{key}.", rest, value)
        elif isinstance(value, dict):
            for inner, item in value.items():
                yield from _assign(node[name], child, f"{key}.", [str(inner)], item)
        else:
            yield _is_section(key, child, value)
    elif issubclass(section, Part) and name == "name":
        group = prefix[:-1].replace(".", "/")
        yield f"{asked}: choose it with {group}={value}"
    elif rest and get_origin(hint) is not dict:
        yield unknown_key(asked, section, prefix, value)
    else:
        yield from _update(node, asked, ".".join(names), value)


def _assign_entries(node: DictConfig, section: type, key: str, names: Sequence[str], value: Any) -> Iterator[str]:
    """Set one value in a section of named entries; a new name makes a new entry."""
    name, *rest = names
    entry = entry_class(section, name)
    assert entry is not None
    if rest and rest[1:]:
        if rest[0] not in node[name]:
            node[name][rest[0]] = entry()
        yield from _assign(node[name][rest[0]], entry, f"{key}.{rest[0]}.", rest[1:], value)
    elif isinstance(value, dict) and rest and not value:
        node[name][rest[0]] = entry()
    elif isinstance(value, dict):
        for inner, item in value.items():
            yield from _assign_entries(node, section, key, [*names, str(inner)], item)
    else:
        example = ".".join([key, *(rest or ["NAME"]), next(iter(types_of(entry)))])
        yield f"{key}: holds named entries; set one of their keys, such as {example}=…"


def _update(node: DictConfig, asked: str, path: str, value: Any) -> Iterator[str]:
    try:
        OmegaConf.update(node, path, value)
    except OmegaConfBaseException as error:
        yield f"{asked}: {first_line(error)}"


def _is_section(key: str, section: type, value: Any) -> str:
    if issubclass(section, Part):
        return f"{key}: choose it with {key.replace('.', '/')}={value}"
    return f"{key}: is a section; set one of its keys, such as {key}.{next(iter(types_of(section)))}=…"


def unknown_key(key: str, section: type, prefix: str, value: object = None) -> str:
    """Say that a section, or the chosen part, has no such key: which part has it, or the nearest key.

    section: the class in which it was looked for, whose own keys begin with `prefix` (with its dot).
    """
    name = key.removeprefix(prefix)
    group = prefix[:-1].replace(".", "/")
    if group in PARTS:
        kind, having = group.rpartition("/")[2], [part_name(part) for part in PARTS[group] if name in types_of(part)]
        if having:
            others = f"{kind} {having[0]} has it" if len(having) == 1 else f"{kind} {' and '.join(having)} have it"
            return f"{key}: {kind} {part_name(section)} has no such key; {others}: {group}={having[0]}"
        if value in [part_name(part) for part in PARTS[group]]:
            return f"{key}: no such key; choose the {kind} with {group}={value}"
    near = _nearest(key, [*all_keys(), *GROUPS, *(f"{prefix}{field}" for field in types_of(section))])
    return f"{key}: no such key{f'; did you mean {near[0]}?' if near else ''}"


def _nearest(key: str, known: Sequence[str]) -> list[str]:
    """The known key with the same last word, else one with a similar last word in the same section, else in any."""
    parent, last = _split(key)
    same = [other for other in known if _split(other)[1] == last]
    if same:
        return get_close_matches(key, same, 1, cutoff=0.0)
    siblings = {_split(other)[1]: other for other in known if _split(other)[0] == parent}
    return [siblings[word] for word in get_close_matches(last, siblings, 1)] or get_close_matches(key, known, 1, 0.8)


def _split(key: str) -> tuple[str, str]:
    *sections, last = re.split("[./]", key)
    return ".".join(sections), last


@cache
def all_keys() -> tuple[str, ...]:
    """All dotted keys that can be set, those of parts that are not chosen included."""
    default = (key for key, _ in keys_of(MispoConfig()))
    names = {f"{group.replace('/', '.')}.name" for group in PARTS}
    return tuple(key for key in dict.fromkeys([*default, *_keys(MispoConfig, "")]) if key not in names)


def _keys(section: type, prefix: str) -> Iterator[str]:
    for name, hint in types_of(section).items():
        key = f"{prefix}{name}"
        parts = PARTS.get(key.replace(".", "/"), ())
        if parts or is_dataclass(hint):
            for child in parts or (hint,):
                yield from _keys(child, f"{key}.")
        else:
            yield key


def first_line(error: OmegaConfBaseException) -> str:
    """What OmegaConf says, without its context."""
    return str(error.msg or error).splitlines()[0]
