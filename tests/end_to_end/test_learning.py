"""Does it learn? The smoke recipe over two seeds, and the control that must not."""

from pathlib import Path

import pytest

from support.runs import mispo, rows_of


def gain(directory: Path, *overrides: str) -> float:
    """Mean reward of the last three steps minus that of the first three."""
    done = mispo("train", "recipe=smoke", f"run_dir={directory}", *overrides, cwd=directory.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    rewards = [row["reward/mean"] for row in rows_of(directory)[1:]]
    assert len(rewards) == 10
    return sum(rewards[-3:]) / 3 - sum(rewards[:3]) / 3


@pytest.mark.parametrize("seed", [0, 1])
def test_smoke_learns(tmp_path: Path, seed: int) -> None:
    assert gain(tmp_path / "run", f"seed={seed}") >= 0.05


def test_smoke_with_actor_lr_0_does_not_learn(tmp_path: Path) -> None:
    assert abs(gain(tmp_path / "run", "trainer.actor_lr=0")) < 0.05
