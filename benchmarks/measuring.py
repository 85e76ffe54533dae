"""Seconds and peak memory of a function, within this process; the accelerator's where there is one."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """After a warm-up."""
    function()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def seconds_in_turn(
    ways: Mapping[str, Callable[[], object]], repeats: int, least: float = 0.1
) -> dict[str, list[float]]:
    """Of each way, seconds per call in each of `repeats` turns; in a turn all ways are measured one after the other.

    So that what else the machine does meets them alike: compare them turn by turn. Every other turn goes backwards.
    On the CPU this process's own time counts, that of all its threads. least: seconds that a measurement takes; short
    calls are repeated.
    """

    def measure(way: Callable[[], object], calls: int) -> float:
        synchronize()
        start = clock()
        for _ in range(calls):
            way()
        synchronize()
        return (clock() - start) / calls

    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    calls = {}
    for name, way in ways.items():
        way()
        calls[name] = max(1, round(least / measure(way, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            seconds[name].append(measure(ways[name], calls[name]))
    return seconds


def peak_mib(function: Callable[[], object]) -> float:
    """How far the memory in use rises above its start while the function runs once (on the CPU: Linux)."""
    before = in_use_mib()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() / 2**20 - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    function()
    return _status("VmHWM") / 1024 - before


def in_use_mib() -> float:
    """The accelerator's memory that tensors occupy; else the resident set, freed pages given back."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS") / 1024


def synchronize() -> None:
    """Wait for the accelerator."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))
