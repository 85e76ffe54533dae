"""Every part of a method is built, and every field of it is read there."""

from __future__ import annotations

from dataclasses import fields

import pytest

from mispo.build.algorithm import build_method
from mispo.config.algorithm_parts import CORRECTIONS, FILTERS, LOSSES, Gae
from mispo.config.load import load_config
from mispo.config.parts import Part
from mispo.config.registry import PARTS, part_name
from support.reads import recorded

METHOD = ("algorithm/filter", "algorithm/loss", "algorithm/correction", "algorithm/advantage")
CHOICES = [(group, part) for group in METHOD for part in PARTS[group]]


@pytest.mark.parametrize(("group", "part"), CHOICES)
def test_every_field_of_a_part_is_read_when_it_is_built(group: str, part: type[Part]) -> None:
    needed = ["critic=none", "algorithm.truncation=zero"] if group.endswith("advantage") and part is not Gae else []
    config = load_config([f"{group}={part_name(part)}", *needed])
    with recorded(config) as seen:
        build_method(config, (0.0, 1.0))
    own = {(part.__name__, declared.name) for declared in fields(part) if declared.init}
    assert own <= seen


def test_a_part_changes_what_is_built() -> None:
    """No two of a group are the same function with the same settings."""
    for group, parts in (("filter", FILTERS), ("loss", LOSSES), ("correction", CORRECTIONS)):
        built = set()
        for part in parts:
            method = build_method(load_config([f"algorithm/{group}={part_name(part)}"]), (0.0, 1.0))
            built.add(
                str({"filter": method.filter, "loss": method.objective.loss, "correction": method.correct}[group])
            )
        assert len(built) == len(parts)


def test_the_settings_of_a_method_reach_it() -> None:
    options = ["loss_norm=sequence", "kl=0.25", "entropy=0.5", "whiten=none", "truncation=mask", "mask_policy=current"]
    config = load_config(
        [
            *(f"algorithm.{option}" for option in options),
            "rollout.max_new_tokens=77",
            "algorithm.advantage.gamma=0.9",
            "critic.train_on_truncated=false",
        ]
    )
    method = build_method(config, (-1.0, 2.0))
    objective = method.objective
    assert (objective.norm, objective.kl, objective.entropy, objective.max_tokens) == ("sequence", 0.25, 0.5, 77)
    assert (method.whitens, method.truncation, method.rechecks) == (False, "mask", True)
    assert (method.gamma, method.learns_truncated, method.reward_range) == (0.9, False, (-1.0, 2.0))
