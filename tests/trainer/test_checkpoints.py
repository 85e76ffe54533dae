"""What survives a resume: everything that is registered, under its name, and nothing that is unknown."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from mispo.algorithm.controller import QuantileFilter
from mispo.algorithm.loss import mispo_loss
from mispo.algorithm.objective import Objective
from mispo.metrics.record import LowConfidence
from mispo.system.rundir import RunDir
from mispo.trainer.batch import Layout, Packing
from mispo.trainer.checkpoint.files import read_state
from mispo.trainer.checkpoint.states import Checkpoints, State, Stateful
from mispo.trainer.engine import TrainEngine
from mispo.trainer.learner import Learner
from mispo.trainer.policy import ActorModule
from model.build import build_policy
from support.batches import Plain, method_of, settings_of

OBJECTIVE = Objective(mispo_loss, "tokens", 30, 0.0, 0.0)
POLICY, TOKENIZER = build_policy("micro", None, seed=0)


class Remembered:
    """A value that has to survive: this class and its entry among the registered parts are all that it takes."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state(self) -> State:
        return {"value": self.value}

    def restore(self, state: State) -> None:
        self.value = state["value"]


def checkpoints(directory: Path, registered: dict[str, Stateful], *, keep_last: int = 2) -> Checkpoints:
    """Of an actor that has made no updates, without DeepSpeed."""
    plain: Any = Plain("actor", ActorModule(POLICY, torch.float32))
    plain.updates, plain.engine = 0, SimpleNamespace(zero_optimization_stage=lambda: 0)
    packing = Packing("zero", 1, samples_per_prompt=1, penalty=lambda length: 0.0)
    actor = cast(TrainEngine, plain)
    learner = Learner(plain.ranks, actor, None, None, None, packing, settings_of(Layout(100)), False, 0, 0.0, 0)
    everything = {"learner": learner, "evaluation": Evaluated(), **registered}
    return Checkpoints(RunDir(directory), learner, TOKENIZER, everything, keep_last=keep_last, keep_best=0, last=None)


class Evaluated(Remembered):
    """What decides which checkpoints are the best."""

    def __init__(self) -> None:
        super().__init__(0)


def filtered(*, steps: int) -> QuantileFilter:
    return QuantileFilter((0.5, 2.0), (0.9, 0.5), 10, widths={0: 0.001, 2: 0.004} if steps else {}, steps=steps)


def test_what_is_registered_comes_back(tmp_path: Path) -> None:
    low = LowConfidence()
    low.low_L = torch.tensor([0.25, 0.5])
    before = {"filter": filtered(steps=7), "routing": low, "mine": Remembered(41)}
    path = checkpoints(tmp_path, before).save(3)
    after = {"filter": filtered(steps=0), "routing": LowConfidence(), "mine": Remembered(0)}
    resumed = checkpoints(tmp_path, after)
    resumed.restore(path)
    assert after["filter"] == before["filter"]
    assert after["mine"].value == 41
    assert after["routing"].low_L is not None
    assert after["routing"].low_L.tolist() == [0.25, 0.5]
    assert resumed.states() == read_state(path)["states"]
    assert read_state(path)["step"] == 3


def test_the_states_of_an_earlier_moment_are_what_is_saved(tmp_path: Path) -> None:
    """A run that is stopped within a step continues from the end of the one before."""
    mine = Remembered(1)
    saving = checkpoints(tmp_path, {"mine": mine})
    before = saving.states()
    mine.value = 2
    assert saving.last is None
    path = saving.save(1, before)
    assert read_state(path)["states"]["mine"] == {"value": 1}
    assert saving.last == path


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def drawn() -> list[float]:
        return [torch.rand(1).item(), random.random(), float(np.random.rand())]

    saving = checkpoints(tmp_path, {})
    path = saving.save(1)
    expected = drawn()
    drawn()
    saving.restore(path)
    assert drawn() == expected


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["mine", "filter"], "has no state of filter"),
        ([], "has an unknown state, mine"),
    ],
)
def test_a_checkpoint_of_other_parts_is_refused_before_anything_is_restored(
    tmp_path: Path, names: list[str], words: str
) -> None:
    path = checkpoints(tmp_path, {"mine": Remembered(41)}).save(1)
    registered: dict[str, Stateful] = {name: Remembered(0) for name in names}
    resumed = checkpoints(tmp_path, registered)
    with pytest.raises(ValueError, match=rf"--resume: .*step_1 {words}; it was written by another version of mispo"):
        resumed.restore(path)
    assert all(part.state() == {"value": 0} for part in registered.values())


def test_states_are_plain_json(tmp_path: Path) -> None:
    """So that another machine and another version of torch read them."""
    registered = {"filter": filtered(steps=7), "routing": LowConfidence(), "fixed": method_of(OBJECTIVE).filter}
    states = checkpoints(tmp_path, registered).states()
    assert json.loads(json.dumps(states)) == states
    assert states["fixed"] == {}


def test_older_checkpoints_go(tmp_path: Path) -> None:
    saving = checkpoints(tmp_path, {}, keep_last=1)
    for step in (1, 2):
        saving.save(step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_2"]
    assert (tmp_path / "checkpoints/latest").resolve().name == "step_2"
