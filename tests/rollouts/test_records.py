"""Trajectories on disk."""

from dataclasses import fields, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from rollouts.records import load_rollouts, save_rollouts, save_samples
from rollouts.trajectory import Prompt, Trajectory, Turn
from support.trajectories import made_trajectory

TWO_TURNS = made_trajectory(
    1,
    length=6,
    prompt=Prompt(torch.tensor([5, 6]), "ones in 5?", "2", {"not": "kept"}, 1),
    sample=3,
    action_mask=torch.tensor([True, True, False, False, True, True]),
    turns=(Turn((0, 2), 7, "stop"), Turn((4, 6), 9, "length")),
    finish_reason="length",
    weight_version=7,
    routing_confidence=torch.tensor([0.25, 0.75]),
    routed_experts=torch.arange(28, dtype=torch.uint8).reshape(7, 2, 2),
    reward=0.5,
    reward_info={"outcome": "ok", "message": None},
    reward_parts={"task": 0.25, "form": 1.0},
)


def assert_same(one: Trajectory, other: Trajectory) -> None:
    for field in fields(Trajectory):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), field.name
        elif field.name != "prompt":
            assert a == b, field.name
    assert torch.equal(one.prompt.ids, other.prompt.ids)
    assert (one.prompt.text, one.prompt.answer, one.prompt.index) == (
        other.prompt.text,
        other.prompt.answer,
        other.prompt.index,
    )


def test_trajectories_come_back_as_they_were(tmp_path: Path) -> None:
    plain = made_trajectory(0, reward=1.0, reward_info={"outcome": "error", "message": "part task: broken"})
    save_rollouts(tmp_path / "rollouts/step_1.parquet", [plain, TWO_TURNS], {})
    first, second = load_rollouts(tmp_path / "rollouts/step_1.parquet")
    assert_same(first, plain)
    assert_same(replace(second, routed_experts=second.routed_experts.to(torch.uint8)), TWO_TURNS)
    assert second.prompt.row == {}


def test_the_file_has_the_callers_columns_too(tmp_path: Path) -> None:
    path = tmp_path / "step_1.parquet"
    save_rollouts(path, [made_trajectory(0), TWO_TURNS], {"multiplicity": [1, 0]})
    first, second = pq.read_table(path).to_pylist()
    assert first["completion_ids"] == [0, 1, 2]
    assert second["seed"] == 2**62 + 1
    assert first["rollout_logprobs"] == pytest.approx([-0.1, -0.2, -0.3])
    assert (first["multiplicity"], second["multiplicity"]) == (1, 0)
    assert (second["finish_reason"], second["weight_version"], second["outcome"]) == ("length", 7, "ok")
    assert second["turns"][1] == {"start": 4, "stop": 6, "weight_version": 9, "finish_reason": "length"}
    assert dict(second["reward_parts"]) == {"task": 0.25, "form": 1.0}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"turns": [0, 0]}, "'turns' exists already; choose another name"),
        ({"mine": [0]}, "'mine': 1 values, 2 trajectories"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path: Path, columns: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_rollouts(tmp_path / "step_1.parquet", [TWO_TURNS, TWO_TURNS], columns)


def test_a_file_of_an_older_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "step_1.parquet"
    save_rollouts(path, [TWO_TURNS], {})
    for missing in ("turns", "reward_parts"):
        pq.write_table(pq.read_table(path).drop_columns([missing]), tmp_path / "old.parquet")
        with pytest.raises(
            ValueError, match=rf"old\.parquet does not read as rollouts of this version .*\({missing}\)"
        ):
            load_rollouts(tmp_path / "old.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"text\.parquet does not read as rollouts"):
        load_rollouts(tmp_path / "text.parquet")


def test_samples_without_their_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="lacks answer"):
        save_samples(tmp_path / "s.jsonl", [{"question": "", "completion": "", "reward": 0}])
