"""Checkpoint directories: whole or torn, which to keep, where `latest` points."""

import os
from pathlib import Path

import pytest

from mispo.trainer.checkpoint.files import finish_checkpoint, list_checkpoints, newest_checkpoint, superfluous, torn


def write(directory: Path, step: int, score: float | None = None) -> Path:
    temporary, final = directory / f"step_{step}.tmp", directory / f"step_{step}"
    (temporary / "actor").mkdir(parents=True)
    (temporary / "actor/weights").write_bytes(b"12345")
    measured = {"step": 0 if score is None else step, "score": score}
    finish_checkpoint(temporary, final, {"step": step, "states": {"evaluation": measured}})
    return final


def test_latest_moves_with_each_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10):
        write(tmp_path, step)
        assert os.readlink(tmp_path / "latest") == f"step_{step}"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_2", "step_10"]
    assert newest_checkpoint(tmp_path) == (tmp_path / "step_10", [])


def test_what_is_torn_is_named_and_left_out(tmp_path: Path) -> None:
    checkpoints = [write(tmp_path, step) for step in (1, 2, 3, 4)]
    (tmp_path / "step_5.tmp").mkdir()
    (checkpoints[3] / "actor/weights").write_bytes(b"123")
    (checkpoints[2] / "actor/weights").unlink()
    (checkpoints[1] / "state.json").write_text("{")
    newest, problems = newest_checkpoint(tmp_path)
    assert newest == checkpoints[0]
    assert [problem.removeprefix(f"{tmp_path}/") for problem in problems[:2]] == [
        "step_4/actor/weights has 3 bytes of 5",
        "step_3/actor/weights is missing",
    ]
    assert problems[2].startswith(f"{checkpoints[1] / 'state.json'} cannot be read")
    os.truncate(checkpoints[0] / "actor/weights", 0)
    with pytest.raises(ValueError, match=r"--resume: .* holds no whole checkpoint \(.*has 0 bytes of 5"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("last", "best", "dropped"),
    [(1, 0, [1, 2, 3, 4]), (2, 0, [1, 2, 3]), (1, 1, [1, 2, 4]), (1, 2, [1, 4]), (1, 9, [1, 4]), (9, 0, [])],
)
def test_the_last_and_the_best_are_kept(tmp_path: Path, last: int, best: int, dropped: list[int]) -> None:
    """Steps 1 and 4 have no evaluation; of the equals 2 and 3 the later one is better."""
    checkpoints = [write(tmp_path, step, {2: 0.5, 3: 0.5, 5: 0.1}.get(step)) for step in (1, 2, 3, 4, 5)]
    assert superfluous(checkpoints, last, best) == [tmp_path / f"step_{step}" for step in dropped]


def test_a_torn_checkpoint_is_never_among_the_best(tmp_path: Path) -> None:
    checkpoints = [write(tmp_path, step, score) for step, score in ((1, 0.2), (2, 0.9), (3, 0.1))]
    (checkpoints[1] / "actor/weights").unlink()
    assert torn(checkpoints[1]) is not None
    assert superfluous(checkpoints, 1, 1) == [checkpoints[1]]
