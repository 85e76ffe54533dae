"""The child process of a `RewardPool`: builds the reward, then scores what it is sent.

Parent and child exchange JSON lines over pipes. Started as `python -P -m rewards.child SPEC`.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping

from rewards.base import Item, Reward
from rewards.registry import RewardSpec, build_parts

ROUNDING = 1e-9
"""Relative distance outside of its range at which a value is rounded to the range, not refused."""

MAX_MESSAGE = 500
"""Characters of an error that travel with the score."""


def score_item(parts: Mapping[str, Reward], item: Item) -> dict[str, object]:
    """Score one item: {parts: value of each, info}.

    If a part fails, the item has failed: info says what was wrong with which part, and every value is its lowest.
    """
    row = {key: value for key, value in item["row"].items() if key not in ("prompt", "completion", "answer")}
    values: dict[str, float] = {}
    infos: dict[str, object] = {}
    for name, reward in parts.items():
        try:
            values[name], info = score_part(reward, item, row)
        except Exception as error:  # noqa: BLE001  (a verifier may raise anything; it is reported with the score)
            message = f"part {name}: {type(error).__name__}: {error}"
            lowest = {each: reward.low for each, reward in parts.items()}
            return {"parts": lowest, "info": {"outcome": "error", "message": message[:MAX_MESSAGE]}}
        infos |= info if len(parts) == 1 else {f"{name}/{key}": value for key, value in info.items()}
    return {"parts": values, "info": {"outcome": "ok", **infos}}


def score_part(reward: Reward, item: Item, row: Mapping[str, object]) -> tuple[float, dict[str, object]]:
    """Score an item by one part: the value and what the function returned beside it, as JSON has it.

    ValueError for a value outside of the declared range; it may stray from it by rounding.
    """
    result = reward.score(item["prompt"], item["completion"], item["answer"], **row)
    value, info = result if isinstance(result, tuple) else (result, {})
    value = float(value)
    slack = ROUNDING * max(abs(reward.low), abs(reward.high))
    if not math.isfinite(value) or not reward.low - slack <= value <= reward.high + slack:
        raise ValueError(f"the reward {value} is outside its declared range [{reward.low}, {reward.high}]")
    return min(max(value, reward.low), reward.high), dict(json.loads(json.dumps(info, default=str)))


def main() -> None:
    """Build the reward that the first argument names, then score line by line until the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides what these mean, and ends this process
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a verifier prints must not end up among the replies
    sys.path.append(os.getcwd())
    lines: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        for line in sys.stdin.buffer:
            lines.put(line)
        os._exit(0)  # the parent is gone, even if a score still runs

    def write(reply: Mapping[str, object]) -> None:
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()

    try:
        parts = build_parts(RewardSpec.from_json(sys.argv[1]))
    except ValueError as error:
        write({"error": str(error)})
        return
    threading.Thread(target=read, daemon=True).start()
    write(
        {"low": {name: part.low for name, part in parts.items()}, "high": {n: part.high for n, part in parts.items()}}
    )
    while True:
        write(score_item(parts, json.loads(lines.get())))


if __name__ == "__main__":
    main()
