"""Parts: found by group and name, formulas that make up a method's objective, memory of an optimizer."""

import inspect
import re
from dataclasses import fields

import pytest

from mispo.config import algorithm_parts, parts, schema
from mispo.config.algorithm_parts import Bounds, Ppo, Quantile, Tis
from mispo.config.formula import formula
from mispo.config.load import load_config
from mispo.config.parts import AdamW, Muon, Part
from mispo.config.registry import PARTS, chosen_part, find_part, part_name
from mispo.config.schema import MispoConfig


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "mispo",
            "L = −1/N Σ_τ Σ_t 1[0.5 ≤ x ≤ 2]·1[0.996 ≤ ρ̄ ≤ 1.001]·Â·log π_θ,  Â = whiten(GAE(γ=1, λ=1)),  "
            "R̂ = R, V(s_T) if cut",
        ),
        ("ppo", "L = −1/N Σ_τ Σ_t max(min(r·Â, clip(r, 0.8, 1.2)·Â), −3·|Â|)"),
        ("tis", "min(x, 2)·max("),
        ("icepop", "x·1[0.5 ≤ x ≤ 5]·max("),
        (
            "grpo",
            "L = −1/B Σ_τ 1/T Σ_t min(r·Â, clip(r, 0.8, 1.2)·Â),  Â = (R̂ − mean_group)/std_group,  R̂ = R, 0 if cut",
        ),
        ("dr_grpo", "L = −1/(B·T_max) Σ_τ Σ_t min("),
        ("dapo", "clip(r, 0.8, 1.28)·Â),  Â = (R̂ − mean_group)/std_group,  R̂ = R − overlong, 0 − overlong if cut"),
        ("gspo", "min(s·Â, clip(s, 0.9997, 1.0004)·Â)"),
        ("cispo", "sg[clip(r, 0, 5)]·Â·log π_θ"),
        ("mispo_quantile", "1[0.5 ≤ x ≤ 2]·1[|log ρ̄| ≤ b_k]"),
        ("mispo_metropolis", "Σ_t multiplicity(w = ∏x)·Â·log π_θ"),
        ("random_reject", "1[0.5 ≤ x ≤ 2]·1[random, as many as 0.996 ≤ ρ̄ ≤ 1.001]"),
        ("token_only", "Σ_t 1[0.5 ≤ x ≤ 2]·Â·log π_θ"),
        ("no_filter", "Σ_t Â·log π_θ"),
    ],
)
def test_the_objective_of_every_method_in_one_line(name: str, line: str) -> None:
    assert line in formula(load_config([f"algorithm={name}"]))


def test_the_objective_with_everything_around_the_term() -> None:
    config = load_config(
        [
            *("critic=shared", "trainer.critic_minibatches=4", "algorithm.mask_policy=current"),
            *("algorithm.kl=0.1", "algorithm.entropy=0.01", "algorithm.loss_norm=accepted"),
        ]
    )
    assert formula(config) == (
        "L = −1/N_kept Σ_τ Σ_t 1[0.5 ≤ π_θ/π_rollout ≤ 2]·1[0.996 ≤ ρ̄_θ ≤ 1.001]·Â·log π_θ + 0.1·KL(π_θ‖π_ref) "
        "− 0.01·H(π_θ) + 0.5·1/N Σ (V − R̂)²,  Â = whiten(GAE(γ=1, λ=1)),  R̂ = R, V(s_T) if cut"
    )
    rloo = load_config(["algorithm=grpo", "algorithm/advantage=rloo", "algorithm.truncation=mask"])
    assert formula(rloo).endswith("Â = R̂ − mean of the others,  R̂ = R, left out if cut")


def test_a_part_is_found_by_its_name() -> None:
    for group, members in PARTS.items():
        names = [part_name(part) for part in members]
        assert len(set(names)) == len(names)
        for part in members:
            assert find_part(group, part_name(part)) is part
            assert part().name == part_name(part)
    with pytest.raises(ValueError, match=r"^algorithm/filter: no filter named 'quantle'; did you mean quantile\? \("):
        find_part("algorithm/filter", "quantle")


def test_every_part_that_is_written_is_in_a_group() -> None:
    written = {
        item
        for module in (parts, algorithm_parts)
        for _, item in inspect.getmembers(module, inspect.isclass)
        if issubclass(item, Part) and part_name(item)
    }
    assert written == {part for members in PARTS.values() for part in members}


def test_the_name_of_a_part_cannot_be_given() -> None:
    with pytest.raises(TypeError):
        Bounds(name="quantile")  # type: ignore[call-arg]


def test_parts_have_their_own_papers_numbers() -> None:
    assert Quantile().target_acceptance == [0.4, 0.2]
    assert (Ppo().clip, Ppo().dual_clip) == ([0.2, 0.2], 3.0)
    assert Tis().cap == 2.0
    assert algorithm_parts.Gspo().clip == [3e-4, 4e-4]
    assert algorithm_parts.IcePop().bounds == [0.5, 5.0]


def test_only_filters_that_look_at_one_trajectory_can_look_at_a_mini_batch() -> None:
    alone = {part_name(part) for part in algorithm_parts.FILTERS if part.alone}
    assert alone == {"bounds", "token_only"}


def test_bytes_of_optimizer_states() -> None:
    """fp32: a momentum for Muon's matrices, two moments for everything else."""
    assert Muon().state_bytes(hidden=100, others=10) == 4 * 100 + 8 * 10
    assert AdamW().state_bytes(hidden=100, others=10) == 8 * 110


def test_the_sections_hold_a_part_of_each_group() -> None:
    config = MispoConfig()
    chosen = {group: chosen_part(config, group).name for group in PARTS}
    assert chosen == {
        "environment": "single_turn",
        "engine": "native",
        "algorithm/filter": "bounds",
        "algorithm/loss": "mispo",
        "algorithm/correction": "none",
        "algorithm/advantage": "gae",
        "critic": "separate",
        "optimizer": "muon",
    }


def test_every_setting_is_described_under_its_field() -> None:
    described = "".join(inspect.getsource(module) for module in (schema, parts, algorithm_parts))
    kinds = [getattr(schema, name) for name in dir(schema) if name.endswith("Config") and name != "MispoConfig"]
    for kind in (*kinds, *(part for members in PARTS.values() for part in members)):
        assert kind.__doc__, kind.__name__
        for item in fields(kind):
            if "Config" in str(item.type) and "dict" not in str(item.type):
                continue
            pattern = rf'^    {item.name}: [^\n]*\n    """'
            if item.name != "name":
                assert re.search(pattern, described, re.MULTILINE), f"{kind.__name__}.{item.name}"
