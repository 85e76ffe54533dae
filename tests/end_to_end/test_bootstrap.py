"""Truncation through the whole loop: a critic that returns its position, and finish reasons that are engineered."""

import json
from pathlib import Path
from typing import Any

import pytest
from end_to_end.loop_script import SETTINGS

from support.runs import MICRO, python

REWARD = 5.0

VERIFIER = f"""
def score(prompt, completion, answer, **row):
    return {REWARD}

score.low, score.high = 0.0, 1000.0
"""


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bootstrap")
    (folder / "verifier.py").write_text(VERIFIER)
    options = [
        "warm_start.steps=0",
        "rollout.max_new_tokens=8",
        "reward.parts.task.name=verifier:score",
        "algorithm.whiten=none",
    ]
    script = str(Path(__file__).with_name("loop_script.py"))
    done = python(script, str(folder / "out.json"), str(folder / "run"), *MICRO, *options, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


def test_the_state_after_the_last_token_is_one_further_than_all_that_are_scored(decided: dict[str, Any]) -> None:
    for row in decided["steps"][0]:
        first, tokens = row["prompt"] - 1, len(row["values"])
        assert row["values"] == [float(first + t) for t in range(tokens)]
        assert row["bootstrap"] == first + tokens


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_only_what_was_cut_is_bootstrapped(decided: dict[str, Any], number: int) -> None:
    """stop and loop keep their reward: a loop is a failure, no truncation. abort takes no part, nor does what is
    masked."""
    settings, rows = SETTINGS[number], decided["steps"][number]
    gamma, lam = settings["gamma"], settings["lam"]
    assert {row["reason"] for row in rows} == {"stop", "length", "loop", "abort"}
    for row in rows:
        out = row["reason"] == "abort" or (row["reason"] == "length" and settings["truncation"] == "mask")
        assert row["included"] == [not out] * len(row["values"])
        assert row["reward"] == REWARD
        end = REWARD
        if row["reason"] == "length":
            end = {"bootstrap": gamma * row["bootstrap"], "zero": 0.0, "mask": REWARD}[settings["truncation"]]
        after, following = 0.0, end
        for value, advantage, target in zip(
            *(reversed(row[name]) for name in ("values", "advantages", "targets")), strict=True
        ):
            after = following - value + gamma * lam * after
            following = gamma * value
            assert advantage == pytest.approx(after, rel=1e-5, abs=1e-5)
            assert target == pytest.approx(after + value, rel=1e-5, abs=1e-5)


def test_the_masks_are_computed_once_per_step_unless_they_follow_the_current_policy(decided: dict[str, Any]) -> None:
    """(calls of the filter, actor updates) of each step. With values this odd π_θ soon leaves the window."""
    assert decided["calls"][:-1] == [[1, 4]] * (len(SETTINGS) - 1)
    assert SETTINGS[-1]["mask_policy"] == "current"
    assert decided["calls"][-1][0] == 4
