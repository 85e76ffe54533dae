"""metrics.jsonl: whole lines, strict JSON, cut on resume; and Weights & Biases offline, really."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mispo.config.schema import TrackingConfig
from mispo.monitor.rows import before_after, eval_keys, merge_steps, read_rows, references, series
from mispo.monitor.tracking import Tracker
from mispo.system.files import json_line, replacing

DISABLED = TrackingConfig(wandb="disabled")


def tracker(directory: Path, resume_step: int | None = None, **settings: Any) -> Tracker:
    return Tracker(
        directory,
        settings=TrackingConfig(**{"wandb": "disabled", **settings}),
        config={"seed": 0},
        resume_step=resume_step,
        wandb_id=None,
    )


def test_rows_are_there_at_once_and_not_a_number_becomes_null(tmp_path: Path) -> None:
    writer = tracker(tmp_path)
    writer.log(1, {"reward/mean": 0.5, "loss": math.nan, "grad": math.inf, "none": None})
    expected = {"step": 1, "reward/mean": 0.5, "loss": None, "grad": None, "none": None}
    assert read_rows(tmp_path / "metrics.jsonl") == [expected]
    writer.close()
    writer.close()


def test_resuming_cuts_later_rows_and_keeps_the_others_byte_for_byte(tmp_path: Path) -> None:
    kept = '{"step":0}\n{"step": 1,   "a": 1.10}\n'
    (tmp_path / "metrics.jsonl").write_text(kept + '{"step": 2}\n{"step": 3}\n{"ste')
    writer = tracker(tmp_path, resume_step=1)
    writer.log(2, {"again": 1})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == kept + '{"step": 2, "again": 1}\n'


def test_a_new_run_never_writes_over_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match=r"run_dir: .* exists already"):
        tracker(tmp_path)


def test_a_torn_last_line_is_left_out_and_a_torn_earlier_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "a"')
    assert read_rows(path) == [{"step": 0}]
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        read_rows(path)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_strict_at_any_depth() -> None:
    assert json.loads(json_line({"a": [1.0, math.nan, {"b": -math.inf}], "c": True})) == {
        "a": [1.0, None, {"b": None}],
        "c": True,
    }


def test_wandb_offline_writes_a_run_that_can_be_synced(tmp_path: Path) -> None:
    writer = tracker(tmp_path, wandb="offline")
    assert writer.wandb_id
    writer.log(1, {"reward/mean": 0.25, "loss": math.nan})
    writer.close()
    (recorded,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{'?' * 8}.wandb")
    assert b"reward/mean" in recorded.read_bytes()


def test_auto_without_a_key_is_offline_and_online_without_one_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    writer = tracker(tmp_path / "auto", wandb="auto")
    writer.close()
    assert list((tmp_path / "auto/wandb").glob("offline-run-*"))
    with pytest.raises(ValueError, match=r"tracking\.wandb: online needs a key"):
        tracker(tmp_path / "online", wandb="online")


ROWS = [
    {"step": 0, "eval/t/greedy": 0.2, "eval/t/avg@4": 0.3, "reference/constant_guess": 0.1},
    {"step": 2, "reward/mean": 0.6, "eval/t/greedy": 0.9},
    {"step": 1, "reward/mean": 0.5, "other": None},
]


def test_reading_rows_back() -> None:
    assert [row["step"] for row in merge_steps([*ROWS, {"step": 1, "reward/mean": 0.7}])] == [0, 1, 2]
    assert series(merge_steps(ROWS), "reward/mean") == ([1, 2], [0.5, 0.6])
    assert series(ROWS, "other") == ([], [])
    assert eval_keys(ROWS) == ["eval/t/greedy", "eval/t/avg@4"]
    before, after = before_after(ROWS)
    assert (before["step"], after["step"]) == (0, 2)
    assert before_after(ROWS[2:]) == ({}, {})
    assert references(ROWS) == {"constant guess": 0.1}
