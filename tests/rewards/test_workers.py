"""The pool: order, misbehaving verifiers, deadlines, dying children, and that nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rewards.workers import MAX_DEATHS, RewardPool, RewardSpec


@pytest.fixture(autouse=True)
def _verifiers_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))


def item(completion: str, answer: str = "3", **row: Any) -> dict[str, Any]:
    return {"prompt": "question", "completion": completion, "answer": answer, "row": row}


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() if sys.platform == "linux" else _signal_0(pid)


def _signal_0(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_scores_come_back_in_order_and_children_end_with_the_pool() -> None:
    with RewardPool(RewardSpec("verifiers:length"), workers=2, timeout_s=10) as pool:
        pids = [child.process.pid for child in pool._children]
        scores = pool.score([item("x" * n) for n in (3, 1, 2, 9, 0)])
        assert [s.value for s in scores] == [0.3, 0.1, 0.2, 0.9, 0.0]
        assert pool.score([]) == []
    assert not any(map(alive, pids))
    pool.close()


def test_the_other_columns_of_the_row_are_keyword_arguments() -> None:
    row = {"level": 4, "tags": ["a"], "answer": "shadowed", "prompt": "shadowed"}
    with RewardPool(RewardSpec("verifiers:columns"), 1, 10) as pool:
        (score,) = pool.score([{**item("x"), "row": row}])
    assert score.value == 0.4
    assert score.info == {"outcome": "ok", "others": ["tags"], "prompt": "question", "answer": "3"}


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        ("raise", "ZeroDivisionError"),
        ("nan", "outside its declared range"),
        ("high", r"the reward 2.0 is outside its declared range"),
        ("text", "could not convert"),
        ("none", "TypeError"),
    ],
)
def test_whatever_a_verifier_does_wrong_costs_one_score(completion: str, words: str) -> None:
    with RewardPool(RewardSpec("verifiers:misbehaves"), 1, 10) as pool:
        bad, good = pool.score([item(completion), item("fine")])
    assert bad.value == 0.0
    assert bad.info["outcome"] == "error"
    assert words in bad.info["message"]
    assert (good.value, good.info) == (1.0, {"outcome": "ok"})


def test_what_a_verifier_prints_is_no_score() -> None:
    with RewardPool(RewardSpec("verifiers:misbehaves"), 1, 10) as pool:
        assert [s.value for s in pool.score([item("print"), item("print")])] == [0.5, 0.5]


def test_a_verifier_that_hangs_is_killed_and_the_others_go_on() -> None:
    with RewardPool(RewardSpec("verifiers:misbehaves"), 2, timeout_s=1) as pool:
        hung = pool._children[0].process.pid
        scores = pool.score([item("hang"), *[item("fine") for _ in range(5)]])
        assert not alive(hung)
    assert scores[0].value == 0.0
    assert scores[0].info["outcome"] == "timeout"
    assert "reward.timeout_s = 1" in scores[0].info["message"]
    assert [s.value for s in scores[1:]] == [1.0] * 5


def test_a_child_that_dies_costs_one_score() -> None:
    with RewardPool(RewardSpec("verifiers:misbehaves"), 1, 10) as pool:
        dead, fine = pool.score([item("exit"), item("fine")])
    assert dead.info == {"outcome": "error", "message": "the worker died (exit status 7)"}
    assert fine.value == 1.0


def test_children_that_keep_dying_end_the_run_by_name() -> None:
    with (
        RewardPool(RewardSpec("verifiers:misbehaves"), 1, 10) as pool,
        pytest.raises(RuntimeError, match=r"died 4 times in a row .* 'verifiers:misbehaves' kills its process"),
    ):
        pool.score([item("exit") for _ in range(MAX_DEATHS + 1)])


def test_a_reward_may_declare_its_range() -> None:
    with RewardPool(RewardSpec("verifiers:wide"), 1, 10) as pool:
        assert (pool.low, pool.high) == (-1.0, 2.0)
        assert [s.value for s in pool.score([item("-1"), item("1.5"), item("3")])] == [-1.0, 1.5, -1.0]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (RewardSpec("gmy"), "reward.name: no reward 'gmy'"),
        (RewardSpec("verifiers:missing"), "does not import"),
        (RewardSpec("no_such_module:score"), "does not import"),
        (RewardSpec("verifiers:not_a_function"), "is not a function"),
        (RewardSpec("gym", task="count_bit"), "did you mean count_bits"),
        (RewardSpec("gym"), "set data.task"),
    ],
)
def test_a_reward_that_does_not_exist_is_named(spec: RewardSpec, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RewardPool(spec, 1, 10)


def test_a_folder_named_rewards_where_the_user_stands_does_not_shadow_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards/__init__.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    with RewardPool(RewardSpec("exact"), 1, 10) as pool:
        assert pool.score([item("<think></think>3")])[0].value == 1.0


def test_children_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "import time\nfrom rewards.workers import *\n"
        "pool = RewardPool(RewardSpec('exact'), 2, 10)\n"
        "print(*[c.process.pid for c in pool._children], flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert all(map(alive, pids))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.stdout.close()
    assert not any(map(alive, pids))
