"""Steps on saved trajectories."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mispo.trainer.ranks import Ranks
from rollouts.records import save_rollouts
from rollouts.saved import SavedSampler, load_step, saved_sizes
from rollouts.trajectory import Trajectory, Turn
from support.trajectories import made_trajectory


def step_of(prompts: int, samples: int, version: int = 9) -> list[Trajectory]:
    """Token ids 10·prompt + sample, …"""
    return [
        made_trajectory(
            prompt,
            sample=sample,
            completion_ids=torch.arange(3) + 10 * prompt + sample,
            weight_version=version,
            turns=(Turn((0, 3), version, "stop"),),
        )
        for prompt in range(prompts)
        for sample in range(samples)
    ]


def saved(path: Path, trajectories: Sequence[Trajectory], positions: Sequence[int] | None = None) -> Path:
    save_rollouts(path, trajectories, {"position": list(positions or range(len(trajectories)))})
    return path


def sampler_of(files: list[Path], rank: int = 0, size: int = 1, vocabulary: int = 100) -> SavedSampler:
    ranks = Ranks(rank, size, torch.device("cpu"))
    return SavedSampler(files, *saved_sizes(files), vocabulary, ranks, lambda phase: nullcontext())


def first_tokens(trajectories: Sequence[Trajectory]) -> list[int]:
    return [int(trajectory.completion_ids[0]) for trajectory in trajectories]


def test_each_step_is_a_file_and_each_rank_takes_its_prompts(tmp_path: Path) -> None:
    files = [saved(tmp_path / f"step_{n}.parquet", step_of(3, 2, version=6 + n)) for n in (1, 2)]
    assert saved_sizes(files) == (3, 2)
    assert first_tokens(sampler_of(files).take(1).trajectories) == [0, 1, 10, 11, 20, 21]
    assert first_tokens(sampler_of(files, 0, 2).take(2).trajectories) == [0, 1]
    assert first_tokens(sampler_of(files, 1, 2).take(2).trajectories) == [10, 11, 20, 21]
    assert sampler_of(files).take(1).metrics == {}


def test_the_first_file_stands_for_the_weights_that_the_run_begins_with(tmp_path: Path) -> None:
    first = [*step_of(1, 1, version=5), *step_of(2, 1, version=7)[1:]]
    files = [
        saved(tmp_path / "step_1.parquet", first),
        saved(tmp_path / "step_2.parquet", step_of(2, 1, version=11)),
    ]
    sampler = sampler_of(files)
    for step, versions in ((1, [-2, 0]), (2, [4, 4])):
        trajectories = sampler.take(step).trajectories
        assert [t.weight_version for t in trajectories] == versions
        assert [t.turns[0].weight_version for t in trajectories] == versions


def test_nothing_is_published(tmp_path: Path) -> None:
    sampler = sampler_of([saved(tmp_path / "step_1.parquet", step_of(1, 1))])
    assert sampler.publish(None) == {}


def test_files_of_several_ranks_have_the_order_of_the_step(tmp_path: Path) -> None:
    whole = step_of(4, 2)
    for rank, positions in enumerate(([2, 3, 6, 7], [0, 1, 4, 5])):
        saved(tmp_path / f"step_1.rank{rank}.parquet", [whole[p] for p in positions], positions)
    found = load_step(tmp_path / "step_1.parquet")
    assert first_tokens(found) == first_tokens(whole)
    assert saved_sizes([tmp_path / "step_1.parquet"]) == (4, 2)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    small, large = (saved(tmp_path / f"step_{n}.parquet", step_of(n, 2)) for n in (1, 2))
    with pytest.raises(ValueError, match=r"--rollouts: the files differ .*step_1.* has 1 × 2, .*step_2.* has 2 × 2"):
        saved_sizes([small, large])
    with pytest.raises(ValueError, match=r"--rollouts: .*cut\.parquet does not hold equally many samples"):
        saved_sizes([saved(tmp_path / "cut.parquet", step_of(2, 2)[:3])])
    with pytest.raises(ValueError, match=r"--rollouts: no such file '.*step_9\.parquet'; give RUN/rollouts"):
        saved_sizes([tmp_path / "step_9.parquet"])


def test_tokens_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    files = [saved(tmp_path / "step_1.parquet", step_of(3, 2))]
    assert sampler_of(files, vocabulary=24).take(1)
    with pytest.raises(ValueError, match=r"has the token 23, but the model knows only 23; these are rollouts of anot"):
        sampler_of(files, vocabulary=23).take(1)
