"""Ctrl-C and SIGTERM: the first asks the run to stop with a checkpoint, the second ends it at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

NOTICE = (
    b"\nstopping: the updates of this step are finished and a checkpoint is written; "
    b"a second signal ends the run at once\n"
)


class Interrupt:
    """The signals that have asked this rank to stop.

    asked: whether a signal has come since `arm`. The loop checks it where all ranks can agree; work that can be
    discarded, such as sampling, checks it often and ends early.
    """

    def __init__(self) -> None:
        self._received: set[int] = set()
        self._talks = False
        self._echoes = False

    @property
    def asked(self) -> bool:
        return bool(self._received)

    def arm(self, *, talks: bool, launched: bool = False) -> None:
        """Take signals as requests to stop; before this call they raise KeyboardInterrupt.

        talks: whether this rank prints the notice. launched: whether a launcher started this process. A launcher passes
        a SIGTERM on that Slurm may also have sent to this process, so a second SIGTERM is then ignored. Launchers kill
        processes that do not end.
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
    """Let a further signal end the process without a message, while a stopped run is being closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(130))
