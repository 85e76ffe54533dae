"""Every way in which a command's run can end: exit status, closing, what is said and what is left behind."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mispo.commands.session import Use, has_checkpoint, session
from mispo.system.rundir import RunDir


@dataclass
class FakeRun:
    """Stands in for a run: remembers with which exit codes it was closed."""

    directory: Path
    last_checkpoint: Path | None = None
    step: int = 3
    closed: list[int] = field(default_factory=list)
    handlers: list[object] = field(default_factory=list)

    def close(self, exit_code: int) -> None:
        self.closed.append(exit_code)
        self.handlers.append(signal.getsignal(signal.SIGINT))


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def directory(tmp_path: Path) -> RunDir:
    """A run directory as `mispo train` prepares it."""
    found = RunDir(tmp_path / "run")
    found.root.mkdir()
    found.config.write_text("seed: 0\n")
    return found


def raising(error: BaseException) -> Callable[..., FakeRun]:
    def fail(*arguments: object) -> FakeRun:
        raise error

    return fail


def test_success_with_a_fake_run_closes_it_and_then_finishes(directory: RunDir) -> None:
    run, order = FakeRun(directory.root), []
    status = session(
        directory,
        Use.BEGIN,
        lambda: run,
        lambda opened: order.append(("work", list(opened.closed))),
        lambda closed: order.append(("finish", list(closed.closed))),
    )
    assert status == 0
    assert order == [("work", []), ("finish", [0])]
    assert run.closed == [0]
    assert directory.config.exists()


def test_failure_of_a_fake_run_is_shown_with_its_last_checkpoint(
    directory: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FakeRun(directory.root, last_checkpoint=directory.checkpoint(2))
    assert session(directory, Use.BEGIN, lambda: run, raising(RuntimeError("the engine is gone"))) == 1
    assert run.closed == [1]
    said = capsys.readouterr().err
    assert f"error: the engine is gone\nThe full trace is in {directory.error}.\n" in said
    assert f"The last checkpoint is step_2; continue with: mispo train --resume {directory.root}\n" in said
    assert "RuntimeError: the engine is gone" in directory.error.read_text()


def test_failure_before_there_is_a_run_keeps_the_directory_with_the_trace(
    directory: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session(directory, Use.BEGIN, raising(OSError("no space")), lambda run: None) == 1
    assert "OSError: no space" in directory.error.read_text()
    said = capsys.readouterr().err
    assert "error: no space" in said
    assert "checkpoint" not in said


def test_failure_while_a_fake_run_finishes_does_not_close_it_twice(
    directory: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FakeRun(directory.root)
    status = session(directory, Use.BEGIN, lambda: run, lambda run: None, raising(OSError("no space")))
    assert status == 1
    assert run.closed == [0]
    assert "error: no space" in capsys.readouterr().err


def test_bad_input_before_there_is_a_run_leaves_no_directory(directory: RunDir) -> None:
    directory.reference.mkdir()
    with pytest.raises(ValueError, match=r"data\.path"):
        session(directory, Use.BEGIN, raising(ValueError("data.path: empty")), lambda run: None)
    assert not directory.root.exists()


@pytest.mark.parametrize("use", [Use.CONTINUE, Use.READ])
def test_bad_input_leaves_a_directory_that_was_there(directory: RunDir, use: Use) -> None:
    with pytest.raises(ValueError, match=r"data\.path"):
        session(directory, use, raising(ValueError("data.path: empty")), lambda run: None)
    assert directory.config.exists()


def test_bad_input_leaves_a_directory_with_something_else_in_it(directory: RunDir) -> None:
    (directory.root / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"data\.path"):
        session(directory, Use.BEGIN, raising(ValueError("data.path: empty")), lambda run: None)
    assert (directory.root / "notes.txt").read_text() == "mine"


def test_bad_input_that_a_fake_run_meets_later_closes_it(directory: RunDir) -> None:
    run = FakeRun(directory.root)
    with pytest.raises(ValueError, match="token"):
        session(directory, Use.BEGIN, lambda: run, raising(ValueError("token 9")))
    assert run.closed == [1]
    assert directory.config.exists()


def test_an_error_of_the_program_closes_a_fake_run_and_is_raised(directory: RunDir) -> None:
    run = FakeRun(directory.root)
    with pytest.raises(KeyError):
        session(directory, Use.BEGIN, lambda: run, raising(KeyError("bug")))
    assert run.closed == [1]


def test_ctrl_c_before_there_is_a_run_leaves_no_directory(
    directory: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session(directory, Use.BEGIN, raising(KeyboardInterrupt()), lambda run: None) == 130
    assert capsys.readouterr().err == "interrupted before the first step; nothing to resume\n"
    assert not directory.root.exists()


def test_ctrl_c_closes_a_fake_run_and_says_how_to_continue(
    directory: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FakeRun(directory.root, last_checkpoint=directory.checkpoint(3))
    assert session(directory, Use.BEGIN, lambda: run, raising(KeyboardInterrupt())) == 130
    assert run.closed == [130]
    assert run.handlers[0] is not signal.default_int_handler, "while it is closed a second Ctrl-C must end at once"
    assert capsys.readouterr().err == (
        "interrupted after step 3; the last checkpoint is step_3\n"
        f"continue with: mispo train --resume {directory.root}\n"
    )


def test_ctrl_c_without_a_checkpoint_of_a_fake_run_says_so(
    directory: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FakeRun(directory.root)
    assert session(directory, Use.BEGIN, lambda: run, raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted after step 3; there is no checkpoint yet, so start a new run\n"
    assert directory.config.exists()


def test_sigterm_to_a_fake_run_is_a_ctrl_c(directory: RunDir) -> None:
    run = FakeRun(directory.root)
    assert session(directory, Use.BEGIN, lambda: run, lambda run: os.kill(os.getpid(), signal.SIGTERM)) == 130
    assert run.closed == [130]


def test_ranks_but_the_first_are_silent_about_ctrl_c_and_remove_nothing(
    directory: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert session(directory, Use.BEGIN, raising(KeyboardInterrupt()), lambda run: None) == 130
    assert capsys.readouterr().err == ""
    assert directory.config.exists()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RuntimeError("no memory"), 1, "error: no memory\n"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written\n"),
    ],
)
def test_a_fake_run_that_is_only_read_gets_no_error_file(
    directory: RunDir, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, said: str
) -> None:
    run = FakeRun(directory.root, last_checkpoint=directory.checkpoint(3))
    assert session(directory, Use.READ, lambda: run, raising(error)) == status
    assert run.closed == [status]
    assert capsys.readouterr().err == said
    assert not directory.error.exists()


def test_a_checkpoint_counts_once_its_state_is_written(directory: RunDir) -> None:
    (directory.checkpoints / "step_2.tmp").mkdir(parents=True)
    directory.checkpoint(1).mkdir()
    assert not has_checkpoint(directory)
    (directory.checkpoint(1) / "state.json").write_text("{}")
    assert has_checkpoint(directory)
