"""Rewards run in child processes, so that a verifier that hangs or crashes costs one score, not the run.

Parent and child exchange JSON lines over pipes. Started by `RewardPool`, as `python -m rewards.workers`.
"""

from __future__ import annotations

import json
import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rewards.base import Reward, load_function, mix_format, score_exact

START_TIMEOUT_S = 120.0
"""Seconds in which a child must have imported its verifier."""

MAX_DEATHS = 3
"""Times in a row that children may die by themselves before the pool gives up."""


@dataclass(frozen=True)
class RewardSpec:
    """Which reward the children build; plain data, sent to them as JSON.

    name: gym, exact or package.module:function. task: reasoning-gym's generator, for gym.
    format_weight: share of the format reward, in [0, 1].
    """

    name: str
    task: str | None = None
    format_weight: float = 0.0


@dataclass(frozen=True)
class Score:
    """A finite value within the reward's range, and how it came about.

    info["outcome"]: ok, timeout or error; with error also info["message"]. Not ok means value = low.
    """

    value: float
    info: dict[str, Any] = field(default_factory=dict)


def build_reward(spec: RewardSpec) -> Reward:
    """The reward that a spec names; ValueError for an unknown name or task."""
    if spec.name == "gym":
        from rewards.gym import gym_reward  # a second to import, needed by this reward only

        if spec.task is None:
            raise ValueError("reward.name: gym scores reasoning-gym tasks; set data.task, or use exact")
        reward = gym_reward(spec.task)
    elif spec.name == "exact":
        reward = Reward(score_exact)
    elif ":" in spec.name:
        reward = load_function(spec.name)
    else:
        raise ValueError(f"reward.name: no reward {spec.name!r}; give gym, exact or package.module:function")
    return mix_format(reward, spec.format_weight) if spec.format_weight > 0 else reward


class RewardPool:
    """`workers` child processes that score; a context manager.

    timeout_s: wall-clock limit of a single score. Raises ValueError if the reward cannot be built, and
    RuntimeError if children keep dying or do not start in time.
    """

    def __init__(self, spec: RewardSpec, workers: int, timeout_s: float) -> None:
        self.spec = spec
        self.timeout_s = timeout_s
        self._deaths = 0
        self._children: list[_Child] = []
        try:
            for _ in range(workers):
                self._children.append(_Child(spec))
            for child in self._children:
                child.wait_ready()
        except BaseException:
            self.close()
            raise
        self.low, self.high = self._children[0].low, self._children[0].high

    def score(self, items: Sequence[dict[str, Any]]) -> list[Score]:
        """One score per item {prompt, completion, answer, row}, in order."""
        waiting = deque(range(len(items)))
        scores: dict[int, Score] = {}
        while len(scores) < len(items):
            for child in self._children:
                if child.job is None and waiting:
                    child.send(waiting.popleft(), items)
            busy = [child for child in self._children if child.job is not None]
            deadline = min(child.sent for child in busy) + self.timeout_s
            select.select(busy, [], [], max(0.0, deadline - time.monotonic()))
            for child in busy:
                index = child.job
                assert index is not None
                score = self._collect(child)
                if score is not None:
                    scores[index] = score
        return [scores[index] for index in range(len(items))]

    def _collect(self, child: _Child) -> Score | None:
        """The score that a busy child has finished, None while it may still work on it."""
        reply = child.reply()
        if reply is not None:
            self._deaths = 0
            child.job = None
            return Score(reply["value"], reply["info"])
        if child.process.poll() is not None:
            self._deaths += 1
            if self._deaths > MAX_DEATHS:
                raise RuntimeError(
                    f"reward workers died {self._deaths} times in a row (exit status {child.process.returncode}); "
                    f"the verifier {self.spec.name!r} kills its process"
                )
            return self._replace(child, "error", f"the worker died (exit status {child.process.returncode})")
        if time.monotonic() - child.sent >= self.timeout_s:
            return self._replace(child, "timeout", f"no score within reward.timeout_s = {self.timeout_s:g} s")
        return None

    def _replace(self, child: _Child, outcome: str, message: str) -> Score:
        child.kill()
        fresh = _Child(self.spec)
        self._children[self._children.index(child)] = fresh
        fresh.wait_ready()
        return Score(self.low, {"outcome": outcome, "message": message})

    def close(self) -> None:
        """Ends the children. Safe to call twice."""
        for child in self._children:
            child.kill()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Child:
    """One worker process, seen from the parent."""

    def __init__(self, spec: RewardSpec) -> None:
        # -P: a directory rewards/ where the user happens to stand must not shadow this package.
        command = [sys.executable, "-P", "-m", "rewards.workers", json.dumps(vars(spec))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.job: int | None = None
        self.sent = time.monotonic()
        self.low, self.high = 0.0, 1.0
        self._buffer = b""

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def wait_ready(self) -> None:
        deadline = self.sent + START_TIMEOUT_S
        while (reply := self.reply()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise RuntimeError(f"a reward worker did not start within {START_TIMEOUT_S:g} s (importing)")
            if self.process.poll() is not None:
                raise RuntimeError(f"a reward worker died at its start (status {self.process.returncode})")
            select.select([self], [], [], min(left, 1.0))
        if "error" in reply:
            raise ValueError(reply["error"])
        self.low, self.high = reply["low"], reply["high"]

    def send(self, index: int, items: Sequence[dict[str, Any]]) -> None:
        assert self.process.stdin is not None
        self.job, self.sent = index, time.monotonic()
        try:
            self.process.stdin.write(json.dumps(items[index], default=str).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.process.wait()  # died since its last score; `_collect` finds it so

    def reply(self) -> dict[str, Any] | None:
        """The next whole line, None if there is none yet."""
        while b"\n" not in self._buffer:
            if not select.select([self], [], [], 0)[0]:
                return None
            data = os.read(self.fileno(), 1 << 16)
            if not data:
                self.process.wait()
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # bytes that the dead child never read


def score_item(reward: Reward, item: dict[str, Any]) -> dict[str, Any]:
    """Runs in the child: {value, info} of one item; whatever the verifier does wrong becomes an outcome."""
    row = {key: value for key, value in item["row"].items() if key not in ("prompt", "completion", "answer")}
    try:
        result = reward.score(item["prompt"], item["completion"], item["answer"], **row)
        value, info = result if isinstance(result, tuple) else (result, {})
        value = float(value)
        if not math.isfinite(value) or not reward.low <= value <= reward.high:
            raise ValueError(f"the reward {value} is outside its declared range [{reward.low}, {reward.high}]")
        return {"value": value, "info": {"outcome": "ok", **json.loads(json.dumps(info, default=str))}}
    except Exception as error:  # noqa: BLE001  (a verifier may raise anything; it is reported with the score)
        message = f"{type(error).__name__}: {error}"
        return {"value": reward.low, "info": {"outcome": "error", "message": message[:500]}}


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a verifier prints must not end up among the replies
    sys.path.append(os.getcwd())
    lines: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        for line in sys.stdin.buffer:
            lines.put(line)
        os._exit(0)  # the parent is gone, even if a score still runs

    def write(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()

    try:
        reward = build_reward(RewardSpec(**json.loads(sys.argv[1])))
    except ValueError as error:
        write({"error": str(error)})
        return
    threading.Thread(target=read, daemon=True).start()
    write({"low": reward.low, "high": reward.high})
    while True:
        write(score_item(reward, json.loads(lines.get())))


if __name__ == "__main__":
    _main()
