"""Notices when a phase of a step takes unreasonably long: says which one, and what every thread is waiting for."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Watchdog:
    """Looks at the clock in a separate thread, and reports once each phase that lasts longer than `limit_s`.

    It ends nothing, since collectives and verifiers have deadlines; it shows who is waiting meanwhile.
    limit_s: seconds, > 0. name: of this process in the message, for example rank 3. stream: with a file descriptor.
    """

    def __init__(self, limit_s: float, name: str, stream: TextIO | None = None) -> None:
        self.limit_s = limit_s
        self.name = name
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()
        self._phase: tuple[str, float] | None = None
        self._reported: tuple[str, float] | None = None
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def watch(self, phase: str) -> Iterator[None]:
        """Time a phase; of phases inside one another the inner one counts."""
        with self._lock:
            outer, self._phase = self._phase, (phase, time.monotonic())
        try:
            yield
        finally:
            with self._lock:
                # The outer phase is timed from here on.
                self._phase = outer and (outer[0], time.monotonic())

    def _watch(self) -> None:
        while True:
            time.sleep(self.limit_s / 10)
            with self._lock:
                phase = self._phase
            if phase is None or phase == self._reported or time.monotonic() - phase[1] < self.limit_s:
                continue
            self._reported = phase
            self._stream.write(
                f"\n{self.name} has been in the phase {phase[0]!r} for more than {self.limit_s:g} s (alarms.stall_s); "
                "this is what its threads do:\n"
            )
            self._stream.flush()
            faulthandler.dump_traceback(self._stream, all_threads=True)
