"""When things are due, and where a run keeps its files."""

from dataclasses import replace
from pathlib import Path

import pytest

from mispo.system.rundir import RunDir
from mispo.system.schedule import Schedule

SCHEDULE = Schedule(start=None, steps=7, pretrain_steps=0, evaluate_every=3, save_every=2, attribute_every=3)
STEPS = range(1, 8)


def test_things_are_due_every_so_many_steps_and_at_the_end() -> None:
    assert [step for step in STEPS if SCHEDULE.evaluates(step)] == [3, 6, 7]
    assert [step for step in STEPS if SCHEDULE.saves(step)] == [2, 4, 6, 7]
    assert [step for step in STEPS if SCHEDULE.attributes(step)] == [1, 3, 6, 7]


def test_0_means_only_the_end_and_for_an_attribution_only_the_beginning() -> None:
    rarely = replace(SCHEDULE, evaluate_every=0, save_every=0, attribute_every=0)
    assert [step for step in STEPS if rarely.evaluates(step)] == [7]
    assert [step for step in STEPS if rarely.saves(step)] == [7]
    assert [step for step in STEPS if rarely.attributes(step)] == [1]


@pytest.mark.parametrize(
    ("rank", "ranks", "name"),
    [(0, 1, "step_3.parquet"), (0, 2, "step_3.rank0.parquet"), (1, 2, "step_3.rank1.parquet")],
)
def test_every_rank_has_a_file_for_its_rollouts(rank: int, ranks: int, name: str) -> None:
    assert RunDir(Path("run")).rollouts(3, rank, ranks) == Path("run/rollouts") / name


def test_no_two_paths_of_a_run_are_the_same() -> None:
    directory = RunDir(Path("run"))
    names = [name for name, value in vars(RunDir).items() if isinstance(value, property)]
    paths = {getattr(directory, name) for name in names} | {directory.rollouts(1), directory.checkpoint(1)}
    assert len(paths) == len(names) + 2
    assert all(path.parts[0] == "run" for path in paths)
    assert directory.checkpoint(1).parent == directory.checkpoints
