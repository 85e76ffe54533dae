"""Ctrl-C in the middle: status 130, whole files, no child left, and the run goes on where it says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import MICRO, mispo, rows_of

DEADLINE_S = 240.0


def heed_interrupts() -> None:
    """A background job of a shell ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(run: Path, *overrides: str) -> subprocess.Popen[str]:
    """A run in a process group of its own, as a terminal would start it."""
    command = [sys.executable, "-P", "-m", "mispo.cli", "train", *MICRO, f"run_dir={run}", *overrides]
    return subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=heed_interrupts,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline, f"no {path} after {DEADLINE_S:g} s"
        time.sleep(0.05)


def members_of(group: int) -> list[str]:
    """Processes of a group that still run."""
    found = subprocess.run(["ps", "-eo", "pgid,stat,args"], capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=2) for line in found.stdout.splitlines()[1:]]
    return [row[2] for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_run_leaves_whole_files_and_says_how_to_go_on(tmp_path: Path, number: int) -> None:
    run = tmp_path / "run"
    process = start(run, "trainer.steps=500", "checkpoint.every=1")
    wait_for(process, run / "checkpoints/step_2")
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert f"continue with: mispo train --resume {run}" in said
    assert members_of(process.pid) == []

    lines = (run / "metrics.jsonl").read_text()
    assert lines.endswith("\n")
    steps = [json.loads(line)["step"] for line in lines.splitlines()]
    assert steps == list(range(len(steps)))
    checkpoints = sorted(int(p.name.removeprefix("step_")) for p in (run / "checkpoints").glob("step_*[0-9]"))
    for step in checkpoints:
        assert (run / f"checkpoints/step_{step}/state.json").exists()

    last = checkpoints[-1]
    done = mispo("train", "--resume", str(run), f"trainer.steps={last + 1}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["step"] for row in rows_of(run)] == list(range(last + 2))
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_ctrl_c_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, "warm_start.steps=100000")
    wait_for(process, run / "config.yaml")
    time.sleep(8)  # by now it imports or warms up
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "nothing to resume" in said
    assert "Traceback" not in said
    assert not run.exists()
    assert members_of(process.pid) == []


def test_ctrl_c_in_a_sweep_ends_the_whole_sweep(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "mispo.cli", "train", "-m", *MICRO, "seed=0,1", f"run_dir={tmp_path}/sweep"]
    process = subprocess.Popen(
        [*command, "trainer.steps=500"],
        start_new_session=True,
        preexec_fn=heed_interrupts,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(process, tmp_path / "sweep/0/metrics.jsonl")
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert not (tmp_path / "sweep/1").exists()
    assert members_of(process.pid) == []
