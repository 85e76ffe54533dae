"""Which files and which directory a `mispo train` means."""

from pathlib import Path

import pytest

from mispo.commands.train import run_directory, split_rollouts
from mispo.config.load import load_config


def test_overrides_behind_the_files_of_rollouts_are_overrides(tmp_path: Path) -> None:
    one, two = tmp_path / "step_1.parquet", tmp_path / "a=b.parquet"
    one.touch()
    two.touch()
    files, overrides = split_rollouts([str(one), str(two), "seed=1"], ["recipe=smoke"])
    assert files == [one, two]
    assert overrides == ["recipe=smoke", "seed=1"]


def test_the_files_of_several_ranks_are_one_step(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"step_1.rank{rank}.parquet").touch()
    assert split_rollouts([str(tmp_path / "step_1.parquet")], []) == ([tmp_path / "step_1.parquet"], [])
    with pytest.raises(ValueError, match=r"--rollouts: no such file '.*step_2\.parquet'"):
        split_rollouts([str(tmp_path / "step_2.parquet")], [])


def test_the_run_directory_is_named_after_what_runs() -> None:
    config = load_config(["recipe=smoke"])
    assert run_directory(config, "smoke").root.match("runs/smoke-????????-??????")
    config.run_dir = "~/mine"
    assert run_directory(config, "smoke").root == Path.home() / "mine"
