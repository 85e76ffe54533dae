"""A phase that hangs is named once, with the stacks of all threads; one that moves on is left in peace."""

import time
from pathlib import Path

from mispo.monitor.watchdog import Watchdog


def said(path: Path, count: int, within_s: float = 10) -> str:
    """What the file holds as soon as it names `count` phases."""
    deadline = time.monotonic() + within_s
    while (text := path.read_text()).count("has been in the phase") < count and time.monotonic() < deadline:
        time.sleep(0.02)
    return text


def test_a_phase_that_hangs_is_named_once_with_all_stacks(tmp_path: Path) -> None:
    path = tmp_path / "said"
    with path.open("w") as stream:
        dog = Watchdog(0.2, "rank 3", stream)
        with dog.watch("step"), dog.watch("reward"):
            text = said(path, 1)
            time.sleep(0.5)
            assert path.read_text() == text
        assert "rank 3 has been in the phase 'reward' for more than 0.2 s (alarms.stall_s)" in text
        assert "test_a_phase_that_hangs_is_named_once_with_all_stacks" in text
        assert text.count("has been in the phase") == 1
        with dog.watch("score"):
            assert "in the phase 'score'" in said(path, 2)


def test_phases_that_move_on_and_a_run_at_rest_are_left_in_peace(tmp_path: Path) -> None:
    path = tmp_path / "said"
    with path.open("w") as stream:
        dog = Watchdog(5.0, "rank 0", stream)
        for _ in range(20):
            with dog.watch("step"), dog.watch("rollout"):
                time.sleep(0.01)
        assert path.read_text() == ""
        dog.limit_s = 0.1
        time.sleep(0.8)
        assert path.read_text() == ""
