"""Ctrl-C, SIGTERM, kill −9, a torn checkpoint, a full disk: the run says what is, and goes on bit for bit."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from support.runs import MICRO, mispo, rows_of, train, without_times

DEADLINE_S = 240.0


def heed_interrupts() -> None:
    """A background job of a shell ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(run: Path, *overrides: str, launcher: Sequence[str] = (sys.executable, "-P")) -> subprocess.Popen[str]:
    """A run in a separate process group, as a terminal would start it."""
    return subprocess.Popen(
        [*launcher, "-m", "mispo.cli", "train", *MICRO, f"run_dir={run}", *overrides],
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


def wait_for_rows(process: subprocess.Popen[str], run: Path, count: int) -> None:
    wait_for(process, run / "metrics.jsonl")
    deadline = time.monotonic() + DEADLINE_S
    while len((run / "metrics.jsonl").read_bytes().splitlines()) < count:
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline, f"no {count} rows after {DEADLINE_S:g} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps without an interruption."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(run, *LONG)
    return run


LONG = ("trainer.steps=8", "checkpoint.every=3", "rollout.lag=2")


def assert_same_run(run: Path, other: Path) -> None:
    """Metrics, sampled tokens, weights and optimizer states, bit for bit."""
    assert without_times(rows_of(run)) == without_times(rows_of(other))
    columns = ["prompt_ids", "completion_ids", "rollout_logprobs", "reward", "multiplicity", "advantage_mean"]
    for step in range(1, 9):
        a, b = (pq.read_table(r / f"rollouts/step_{step}.parquet", columns=columns) for r in (run, other))
        assert a.equals(b), step
    last = "checkpoints/step_8"
    files = sorted(str(p.relative_to(run / last)) for p in (run / last).rglob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        a, b = (load_file(r / last / file) for r in (run, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(tensor, b[name]) for name, tensor in a.items()), file


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_run_writes_a_checkpoint_and_goes_on_as_if_nothing_had_been(
    straight: Path, tmp_path: Path, number: int
) -> None:
    run = tmp_path / "run"
    process = start(run, *LONG, "checkpoint.every=0")
    wait_for_rows(process, run, 3)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "stopping: the updates of this step are finished" in said
    assert f"continue with: mispo train --resume {run}" in said
    assert members_of(process.pid) == []
    steps = [row["step"] for row in rows_of(run)]
    assert steps == list(range(len(steps)))
    assert os.readlink(run / "checkpoints/latest") == f"step_{steps[-1]}"

    done = mispo("train", "--resume", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(run, straight)


def test_two_ranks_stop_together(tmp_path: Path) -> None:
    """Under torchrun, which sends SIGTERM to its ranks after the terminal's Ctrl-C."""
    run = tmp_path / "run"
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start(run, "trainer.steps=500", "checkpoint.every=0", "trainer.zero_stage=2", launcher=launcher)
    wait_for_rows(process, run, 3)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=90)
    assert said.count("stopping: the updates of this step are finished") == 1
    last = [row["step"] for row in rows_of(run)][-1]
    assert os.readlink(run / "checkpoints/latest") == f"step_{last}"
    assert f"continue with: mispo train --resume {run}" in said
    assert members_of(process.pid) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run_goes_on_as_if_nothing_had_been(straight: Path, tmp_path: Path, seed: int) -> None:
    """kill −9 at a random moment; then the same command again."""
    run, choose = tmp_path / "run", random.Random(seed)
    process = start(run, *LONG)
    wait_for_rows(process, run, choose.randint(4, 7))
    time.sleep(choose.random())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    done = mispo("train", *MICRO, f"run_dir={run}", *LONG, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(run, straight)


@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_rank_that_is_killed_ends_the_run_with_that_cause_and_it_goes_on(tmp_path: Path, victim: str) -> None:
    """kill −9, as the kernel does when memory is full, after a checkpoint; the rank that is left says how to resume."""
    run = tmp_path / "run"
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start(run, "trainer.steps=500", "checkpoint.every=1", "trainer.zero_stage=2", launcher=launcher)
    wait_for_rows(process, run, 3)
    children = psutil.Process(process.pid).children(recursive=True)
    next(c for c in children if "mispo.cli" in c.cmdline() and c.environ()["RANK"] == victim).kill()
    _, said = process.communicate(timeout=90)
    assert process.returncode == 1
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert len(re.findall("error: another rank has died or is out of reach", said)) == 1
    assert re.search(rf"rank +: {victim} \(local_rank: {victim}\)\n +exitcode +: -9", said), (
        "the launcher's lines name it"
    )
    last = int(os.readlink(run / "checkpoints/latest").removeprefix("step_"))
    assert re.search(rf"The last checkpoint is step_\d+; continue with: mispo train --resume {run}\n", said)
    rows = train(run, f"trainer.steps={last + 1}", ranks=2, resume=True)
    assert [row["step"] for row in rows] == list(range(last + 2))


@pytest.mark.parametrize(
    ("name", "file"),
    [("rollouts", r"step_\d+\.parquet"), ("checkpoints", r"step_\d+")],
    ids=lambda text: text.split("_")[0],
)
def test_a_directory_that_turns_into_a_file_ends_the_run_with_its_path_and_the_run_goes_on_once_it_is_back(
    straight: Path, tmp_path: Path, name: str, file: str
) -> None:
    """In place of one that has become read-only, which would not stop root."""
    run = tmp_path / "run"
    process = start(run, *LONG)
    wait_for(process, run / "checkpoints/latest")
    (run / name).rename(tmp_path / "aside")
    (run / name).write_text("in the way")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert re.search(rf"^error: cannot write {run}/{name}/{file}: .*; fix that, then resume$", said, re.M), said
    assert f"The last checkpoint is step_3; continue with: mispo train --resume {run}" in said
    (run / name).unlink()
    (tmp_path / "aside").rename(run / name)
    done = mispo("train", "--resume", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(run, straight)


def test_a_torn_checkpoint_is_left_out_and_the_one_before_is_used(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run, symlinks=True)
    critic = run / "checkpoints/step_8/critic.safetensors"
    size = critic.stat().st_size
    os.truncate(critic, size // 2)
    done = mispo("train", "--resume", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"left out: {critic} has {size // 2} bytes of {size}" in done.stdout
    assert_same_run(run, straight)


def test_a_full_disk_ends_the_run_with_its_cause_and_the_checkpoint_before(straight: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk: the actor fits, the optimizer's states do not."""
    run = tmp_path / "run"
    shutil.copytree(straight, run, symlinks=True)
    shutil.rmtree(run / "checkpoints/step_8")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    command = [sys.executable, "-P", "-m", "mispo.cli", "train", "--resume", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, preexec_fn=limit)
    assert done.returncode == 1
    assert re.search(r"error: the checkpoint \S*/step_8 could not be written: .*[Ff]ile too large", done.stderr)
    assert f"The last checkpoint is step_6; continue with: mispo train --resume {run}" in done.stderr
    done = mispo("train", "--resume", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(run, straight)


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
