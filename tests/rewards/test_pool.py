"""The pool: order, streaming, misbehaving verifiers, deadlines, dying children, and that nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rewards.base import Item
from rewards.pool import MAX_DEATHS, RewardPool, Score
from rewards.registry import PartSpec, RewardSpec


@pytest.fixture(autouse=True)
def _verifiers_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"), prepend=os.pathsep)


def item(completion: str, answer: str = "3", **row: Any) -> Item:
    return {"prompt": "question", "completion": completion, "answer": answer, "row": row}


def only(name: str, task: str | None = None) -> RewardSpec:
    return RewardSpec({"task": PartSpec(name)}, task)


def drain(pool: RewardPool, count: int) -> dict[int, Score]:
    """So many scores, as they come."""
    scores: dict[int, Score] = {}
    while len(scores) < count:
        scores |= dict(pool.finished(60))
    return scores


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() if sys.platform == "linux" else _signal_0(pid)


def running(pid: int) -> bool:
    """Whether it still does something: one that nobody waits for stays as a zombie."""
    status = Path(f"/proc/{pid}/status")
    try:
        return "Z (zombie)" not in status.read_text() if sys.platform == "linux" else _signal_0(pid)
    except OSError:
        return False


def _signal_0(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_scores_come_back_in_order_and_children_end_with_the_pool() -> None:
    with RewardPool(only("verifiers:length"), workers=2, timeout_s=10) as pool:
        pids = [child.process.pid for child in pool._children]
        scores = pool.score([item("x" * n) for n in (3, 1, 2, 9, 0)])
        assert [s.value for s in scores] == [0.3, 0.1, 0.2, 0.9, 0.0]
        assert pool.score([]) == []
    assert not any(map(alive, pids))
    pool.close()


def test_submitted_items_are_handed_out_as_they_are_scored() -> None:
    with RewardPool(only("verifiers:length"), workers=2, timeout_s=10) as pool:
        assert pool.finished(60) == []  # nothing is being scored, so there is nothing to wait for
        for ticket in (7, 3, 11, 0):
            pool.submit(ticket, item("x" * ticket))
        scores = drain(pool, 4)
        assert {ticket: score.value for ticket, score in scores.items()} == {7: 0.7, 3: 0.3, 0: 0.0, 11: 0.0}
        assert scores[11].info["outcome"] == "error"  # 1.1 is out of range
        assert pool.finished(60) == []


def test_asking_without_a_timeout_never_waits() -> None:
    with RewardPool(only("verifiers:misbehaves"), 1, timeout_s=600) as pool:
        pool.submit(0, item("hang"))
        assert pool.finished() == []
        assert pool.finished(0.01) == []


def test_a_call_of_score_leaves_submitted_items_to_finished() -> None:
    with RewardPool(only("verifiers:length"), 1, 10) as pool:
        pool.submit(4, item("xxxx"))
        assert [score.value for score in pool.score([item("x"), item("xx")])] == [0.1, 0.2]
        pool.submit(5, item("xxxxx"))
        assert {ticket: score.value for ticket, score in drain(pool, 2).items()} == {4: 0.4, 5: 0.5}


def test_the_deadline_of_a_submitted_item_costs_that_score_and_a_new_child_goes_on() -> None:
    with RewardPool(only("verifiers:misbehaves"), 1, timeout_s=0.5) as pool:
        hung = pool._children[0].process.pid
        for ticket, completion in enumerate(("hang", "fine")):
            pool.submit(ticket, item(completion))
        scores = drain(pool, 2)
        assert not alive(hung)
    assert scores[0].info == {"outcome": "timeout", "message": "no score within reward.timeout_s = 0.5 s"}
    assert (scores[0].value, scores[1].value) == (0.0, 1.0)


def test_finished_does_not_wait_for_the_child_that_replaces_a_dead_one() -> None:
    with RewardPool(only("verifiers:misbehaves"), 1, 10) as pool:
        pool.submit(0, item("exit"))
        assert [score.info["outcome"] for score in drain(pool, 1).values()] == ["error"]
        assert not pool._children[0].ready
        pool.submit(1, item("fine"))
        assert drain(pool, 1)[1].value == 1.0


def test_children_that_keep_dying_end_a_stream_too() -> None:
    with RewardPool(only("verifiers:misbehaves"), 1, 10) as pool:
        for ticket in range(MAX_DEATHS + 1):
            pool.submit(ticket, item("exit"))
        with pytest.raises(RuntimeError, match=r"died 4 times in a row .* 'verifiers:misbehaves' kills its process"):
            drain(pool, MAX_DEATHS + 1)


def test_a_ticket_below_0_is_refused() -> None:
    with RewardPool(only("exact"), 1, 10) as pool, pytest.raises(ValueError, match=r"must be at least 0 \(is -1\)"):
        pool.submit(-1, item("3"))


def test_parts_are_summed_with_their_weights_and_so_are_their_ranges() -> None:
    parts = {
        "answer": PartSpec("exact", 0.75),
        "form": PartSpec("format", 0.25),
        "wide": PartSpec("verifiers:wide", 0.5),
        "seen": PartSpec("verifiers:length", 0.0),
    }
    with RewardPool(RewardSpec(parts), 1, 10) as pool:
        assert (pool.low, pool.high) == (-0.5, 2.0)
        (fine, failed) = pool.score([item("1.5", "1.5"), item("text")])
        assert fine.parts == {"answer": 1.0, "form": 0.0, "wide": 1.5, "seen": pytest.approx(0.3)}
        assert fine.value == 0.75 + 0.0 + 0.5 * 1.5
        assert failed.value == pool.low
        assert failed.parts == {"answer": 0.0, "form": 0.0, "wide": -1.0, "seen": 0.0}
        assert failed.info["outcome"] == "error"
        assert failed.info["message"].startswith("part wide: ValueError: could not convert")


def test_a_score_that_never_came_has_the_lowest_value_of_every_part() -> None:
    parts = {"wide": PartSpec("verifiers:wide", 2.0), "hostile": PartSpec("verifiers:misbehaves")}
    with RewardPool(RewardSpec(parts), 1, timeout_s=0.5) as pool:
        (score,) = pool.score([item("hang")])
    assert (score.value, score.parts) == (-2.0, {"wide": -1.0, "hostile": 0.0})


def test_the_other_columns_of_the_row_are_keyword_arguments() -> None:
    row = {"level": 4, "tags": ["a"], "answer": "shadowed", "prompt": "shadowed"}
    with RewardPool(only("verifiers:columns"), 1, 10) as pool:
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
    with RewardPool(only("verifiers:misbehaves"), 1, 10) as pool:
        bad, good = pool.score([item(completion), item("fine")])
    assert bad.value == 0.0
    assert bad.info["outcome"] == "error"
    assert words in bad.info["message"]
    assert (good.value, good.info) == (1.0, {"outcome": "ok"})


def test_what_a_verifier_prints_is_no_score() -> None:
    with RewardPool(only("verifiers:misbehaves"), 1, 10) as pool:
        assert [s.value for s in pool.score([item("print"), item("print")])] == [0.5, 0.5]


def test_a_verifier_that_hangs_is_killed_and_the_others_go_on() -> None:
    with RewardPool(only("verifiers:misbehaves"), 2, timeout_s=1) as pool:
        hung = pool._children[0].process.pid
        scores = pool.score([item("hang"), *[item("fine") for _ in range(5)]])
        assert not alive(hung)
    assert scores[0].value == 0.0
    assert scores[0].info["outcome"] == "timeout"
    assert "reward.timeout_s = 1" in scores[0].info["message"]
    assert [s.value for s in scores[1:]] == [1.0] * 5


def test_a_verifier_that_closes_everything_costs_one_score() -> None:
    with RewardPool(only("verifiers:misbehaves"), 1, 10) as pool:
        closed, good = pool.score([item("close"), item("good")])
    assert closed.info["outcome"] == "error"
    assert good.value == 1.0


def test_what_a_verifier_has_started_ends_with_its_child(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with RewardPool(only("verifiers:misbehaves"), 1, timeout_s=5) as pool:
        (late,) = pool.score([item("start", note=str(note))])
    assert late.info["outcome"] == "timeout"
    deadline = time.monotonic() + 20
    while running(int(note.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(int(note.read_text()))


def test_a_child_that_dies_costs_one_score() -> None:
    with RewardPool(only("verifiers:misbehaves"), 1, 10) as pool:
        dead, fine = pool.score([item("exit"), item("fine")])
    assert dead.info == {"outcome": "error", "message": "the worker died (exit status 7)"}
    assert fine.value == 1.0


def test_children_that_keep_dying_end_the_run_by_name() -> None:
    with (
        RewardPool(only("verifiers:misbehaves"), 1, 10) as pool,
        pytest.raises(RuntimeError, match=r"died 4 times in a row .* 'verifiers:misbehaves' kills its process"),
    ):
        pool.score([item("exit") for _ in range(MAX_DEATHS + 1)])


def test_a_reward_may_declare_its_range() -> None:
    with RewardPool(only("verifiers:wide"), 1, 10) as pool:
        assert (pool.low, pool.high) == (-1.0, 2.0)
        assert [s.value for s in pool.score([item("-1"), item("1.5"), item("3")])] == [-1.0, 1.5, -1.0]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (only("gmy"), r"reward\.parts\.task\.name: no reward 'gmy'; did you mean gym\?"),
        (only("verifiers:missing"), "does not import"),
        (only("no_such_module:score"), "does not import"),
        (only("verifiers:not_a_function"), "is not a function"),
        (only("gym", task="count_bit"), "did you mean count_bits"),
        (only("gym"), "set data.task"),
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
    with RewardPool(only("exact"), 1, 10) as pool:
        assert pool.score([item("<think></think>3")])[0].value == 1.0


def test_children_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "import time\nfrom rewards.pool import *\nfrom rewards.registry import *\n"
        "pool = RewardPool(RewardSpec({'task': PartSpec('exact')}), 2, 10)\n"
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
