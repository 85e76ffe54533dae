"""Ctrl-C and SIGTERM: the first asks the run to stop where a checkpoint is whole; once more, and it ends at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

NOTICE = b"\nstopping: the updates of this step are finished and a checkpoint is written; once more ends it at once\n"


class Interrupt:
    """What signals have asked for, on this rank.

    asked: whether one has come since `arm`. The loop looks at it where all ranks can agree; work that may be thrown
    away, such as sampling, looks at it often and ends early.
    """

    def __init__(self) -> None:
        self._received: set[int] = set()
        self._talks = False
        self._echoes = False

    @property
    def asked(self) -> bool:
        return bool(self._received)

    def arm(self, *, talks: bool, launched: bool = False) -> None:
        """Let signals ask from now on; before, they raise KeyboardInterrupt.

        talks: whether this rank says so. launched: by a launcher, which passes a SIGTERM on that Slurm may have sent to
        this process as well: a second one is then an echo. Launchers kill what does not end.
        """
        self._talks, self._echoes = talks, launched
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Of the same kind: launchers send SIGTERM after the terminal's Ctrl-C.
        if number in self._received:
            if self._echoes and number == signal.SIGTERM:
                return
            raise KeyboardInterrupt
        if self._talks and not self.asked:
            os.write(2, NOTICE)
        self._received.add(number)


def exit_at_once() -> None:
    """Let a further signal end the process without a word, for the time in which a stopped run is put away."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(130))
