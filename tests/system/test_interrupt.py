"""What one signal, and what two of them, do to the program."""

import os
import signal
from collections.abc import Iterator

import pytest

from mispo.system.interrupt import Interrupt


@pytest.fixture
def interrupt() -> Iterator[Interrupt]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    armed = Interrupt()
    armed.arm(talks=False)
    yield armed
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_only_asks_and_the_second_of_its_kind_ends(interrupt: Interrupt) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    assert interrupt.asked
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_under_a_launcher_a_second_sigterm_is_an_echo_of_the_first(interrupt: Interrupt) -> None:
    """Slurm signals every process of a job, and torchrun, one of them, passes it on."""
    interrupt.arm(talks=False, launched=True)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interrupt.asked
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_what_runs_when_the_first_signal_comes_goes_on(interrupt: Interrupt) -> None:
    reached = []
    for number in range(3):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        reached.append((number, interrupt.asked))
    assert reached == [(0, False), (1, True), (2, True)]
