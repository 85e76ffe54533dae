"""Seconds and peak memory of a function, within this process; the accelerator's where there is one."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
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
