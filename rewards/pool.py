"""Rewards run in child processes, so that a verifier that hangs or crashes costs one score, not the run."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

from rewards.base import Item
from rewards.registry import RewardSpec

START_TIMEOUT_S = 120.0
"""Seconds in which a child must have imported its verifier."""

MAX_DEATHS = 3
"""Times in a row that children may die by themselves before the pool gives up."""


@dataclass(frozen=True)
class Score:
    """A finite value within the reward's range, and how it came about.

    parts: the value of each part; value = Σ weight·part. info["outcome"]: ok, timeout or error; with the latter two
    also info["message"]. If it is not ok, every part is at its lowest, and so is the value. The rest of info is what
    the reward functions returned beside their values; of several parts under <part>/<key>.
    """

    value: float
    info: dict[str, object] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)


class RewardPool:
    """Scores completions in `workers` child processes; a context manager.

    timeout_s: wall-clock limit of a single score, over all its parts. low, high: range of the values.
    Raises ValueError if the reward cannot be built; RuntimeError, here and from every method that scores, if children
    keep dying or do not start in time.
    """

    def __init__(self, spec: RewardSpec, workers: int, timeout_s: float) -> None:
        self.spec = spec
        self.timeout_s = timeout_s
        self._deaths = 0
        self._waiting: deque[tuple[int, Item]] = deque()
        self._kept: list[tuple[int, Score]] = []
        self._own_tickets = itertools.count(-1, -1)
        self._children: list[_Child] = []
        try:
            for _ in range(workers):
                self._children.append(_Child(spec))
            for child in self._children:
                while not child.started():
                    select.select([child], [], [], 1.0)
        except BaseException:
            self.close()
            raise
        self._lowest = self._children[0].low
        self.low, self.high = spec.total(self._lowest), spec.total(self._children[0].high)

    def submit(self, ticket: int, item: Item) -> None:
        """Have an item scored; `finished` hands the score out under the ticket.

        ticket: ≥ 0, no other item's that is still being scored. Returns at once.
        """
        if ticket < 0:
            raise ValueError(f"tickets must be at least 0 (is {ticket})")
        self._waiting.append((ticket, item))
        self._hand_out()

    def finished(self, timeout_s: float = 0.0) -> list[tuple[int, Score]]:
        """Return (ticket, score) of submitted items that have been scored since the last call, as they came.

        Waits at most timeout_s for the first one, not at all if nothing is being scored. Deadlines of scores are
        enforced in here: a score that arrived late but before anybody looked is taken.
        """
        kept, self._kept = self._kept, []
        found = self._advance(0.0 if kept else timeout_s)
        return kept + [(ticket, score) for ticket, score in found if ticket >= 0]

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Score the items and wait for them; one score each, in order. Submitted items go on meanwhile."""
        tickets = [next(self._own_tickets) for _ in items]
        self._waiting.extend(zip(tickets, items, strict=True))
        missing, scores = set(tickets), dict[int, Score]()
        while missing:
            for ticket, score in self._advance(self.timeout_s):
                if ticket >= 0:
                    self._kept.append((ticket, score))
                scores[ticket] = score
                missing.discard(ticket)
        return [scores[ticket] for ticket in tickets]

    def _advance(self, timeout_s: float) -> list[tuple[int, Score]]:
        """The scores that have come; waits at most so long for the first."""
        until = time.monotonic() + timeout_s
        while True:
            self._hand_out()
            jobs = [(child, child.job) for child in self._children if child.job is not None]
            scored = [(job, self._collect(child)) for child, job in jobs]
            found = [(job, score) for job, score in scored if score is not None]
            if found or time.monotonic() >= until or not (jobs or self._waiting):
                self._hand_out()
                return found
            active = [child for child in self._children if child.job is not None or not child.ready]
            next_event = min([until, *(child.deadline(self.timeout_s) for child in active)])
            select.select(active, [], [], max(0.0, next_event - time.monotonic()))

    def _hand_out(self) -> None:
        """Give waiting items to idle children."""
        for child in self._children:
            if self._waiting and child.job is None and child.started():
                child.send(*self._waiting.popleft())

    def _collect(self, child: _Child) -> Score | None:
        """The score that a busy child has finished, None while it may still work on it."""
        status = child.process.poll()  # first: what a dead child has written is all there
        reply = child.reply()
        if reply is not None:
            self._deaths = 0
            child.job = None
            return Score(self.spec.total(reply["parts"]), reply["info"], reply["parts"])
        if status is not None:
            self._deaths += 1
            if self._deaths > MAX_DEATHS:
                names = ", ".join(repr(part.name) for part in self.spec.parts.values())
                raise RuntimeError(
                    f"reward workers died {self._deaths} times in a row (exit status {status}); "
                    f"the verifier {names} kills its process"
                )
            return self._replace(child, "error", f"the worker died (exit status {status})")
        if time.monotonic() >= child.deadline(self.timeout_s):
            return self._replace(child, "timeout", f"no score within reward.timeout_s = {self.timeout_s:g} s")
        return None

    def _replace(self, child: _Child, outcome: str, message: str) -> Score:
        child.kill()
        self._children[self._children.index(child)] = _Child(self.spec)
        return Score(self.low, {"outcome": outcome, "message": message}, self._lowest)

    def close(self) -> None:
        """End the children. Safe to call twice."""
        for child in self._children:
            child.kill()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Child:
    """One worker process, seen from the parent. It starts on its own; `started` says when it takes items."""

    def __init__(self, spec: RewardSpec) -> None:
        # -P: a directory rewards/ where the user happens to stand must not shadow this package.
        command = [sys.executable, "-P", "-m", "rewards.child", spec.to_json()]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.ready = False
        self.job: int | None = None
        self.low: dict[str, float] = {}
        self.high: dict[str, float] = {}
        self._since = time.monotonic()
        self._buffer = b""

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def deadline(self, timeout_s: float) -> float:
        """When it must have said something: that it is ready, or the score of its item."""
        return self._since + (timeout_s if self.ready else START_TIMEOUT_S)

    def started(self) -> bool:
        """Whether it is ready. ValueError if the reward cannot be built, RuntimeError if it died or is too late."""
        if self.ready:
            return True
        status = self.process.poll()
        reply = self.reply()
        if reply is None:
            if status is not None:
                raise RuntimeError(f"a reward worker died at its start (status {status})")
            if time.monotonic() >= self.deadline(0.0):
                raise RuntimeError(f"a reward worker did not start within {START_TIMEOUT_S:g} s (importing)")
            return False
        if "error" in reply:
            raise ValueError(reply["error"])
        self.low, self.high, self.ready = reply["low"], reply["high"], True
        return True

    def send(self, ticket: int, item: Item) -> None:
        assert self.process.stdin is not None
        self.job, self._since = ticket, time.monotonic()
        try:
            self.process.stdin.write(json.dumps(item, default=str).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.process.wait()  # died since its last score; `_collect` finds it so

    def reply(self) -> dict | None:
        """The next whole line, None if there is none yet."""
        while b"\n" not in self._buffer:
            if not select.select([self], [], [], 0)[0]:
                return None
            data = os.read(self.fileno(), 1 << 16)
            if not data:  # it has closed its end, though it may live on
                self._end()
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict = json.loads(line)
        return reply

    def _end(self) -> None:
        """End the process and what its verifier has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill(self) -> None:
        """End the process and close its pipes; safe to call twice."""
        self._end()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # bytes that the dead child never read
