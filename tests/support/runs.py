"""Start `mispo` as a user does, in a separate process, and read what it left behind."""

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch

MICRO = [
    "recipe=smoke",
    "tracking.wandb=disabled",
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=4",
    "warm_start.steps=30",
    "warm_start.batch_size=16",
    "warm_start.warmup_steps=5",
    "data.task_args.max_n=63",
    "data.eval_size=8",
    "trainer.tokens_per_microbatch=1024",
    "trainer.critic_minibatches=6",
    "reward=exact",
]
"""A run of a few seconds. For this task `gym` scores as `exact` does, but takes seconds to import in each worker."""

TIMES = ("timing_s/", "perf/")

TESTS = Path(__file__).parents[1]
WITH_TESTS = {
    "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
}
"""Scripts import what tests share, as tests do. The root first: tests/model is not the package `model`."""

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
"""What is not to be inherited from a test that has been a rank itself."""


def mispo(
    *arguments: str, cwd: Path, ranks: int = 1, timeout: float = 400, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run the command; nothing is checked."""
    return python("-m", "mispo.cli", *arguments, cwd=cwd, ranks=ranks, timeout=timeout, fresh=fresh)


def python(
    *command: str, cwd: Path, ranks: int = 1, timeout: float = 400, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE …` or `python FILE …`, forked from a process that has imported everything (forkserver.py).

    fresh: in a process that imports everything itself, as always where there is no Linux, or a GPU: its driver does not
    survive a fork.
    """
    inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHED} | WITH_TESTS
    if fresh or sys.platform != "linux" or torch.cuda.is_available():
        launcher = [sys.executable, "-P"]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        return subprocess.run(
            [*launcher, *command], cwd=cwd, env=inherited, capture_output=True, text=True, timeout=timeout, check=False
        )
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = (Path(folder) / name for name in ("stdout", "stderr"))
        stdout.touch()
        stderr.touch()
        request = {
            "command": command,
            "cwd": str(cwd),
            "environments": [inherited | extra for extra in as_launched(ranks)],
            "seconds": timeout,
            "stdout": str(stdout),
            "stderr": str(stderr),
        }
        send, receive = server()
        send.write(json.dumps(request) + "\n")
        send.flush()
        answer = receive.readline()
        assert answer, "forkserver.py has died; its last words are among those of this test"
        failed = [status for status in json.loads(answer) if status]
        return subprocess.CompletedProcess(command, failed[0] if failed else 0, stdout.read_text(), stderr.read_text())


def as_launched(ranks: int) -> Sequence[dict[str, str]]:
    """What torchrun tells each of its processes; nothing for one alone."""
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    everyone = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [everyone | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


@cache
def server() -> tuple[IO[str], IO[str]]:
    """Its stdin and stdout; it ends when this process does."""
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("forkserver.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Without the thread of pyarrow's allocator, which would be missing after a fork.
        env={**os.environ, **WITH_TESTS, "JE_ARROW_MALLOC_CONF": "background_thread:false"},
    )
    assert process.stdin
    assert process.stdout
    atexit.register(process.communicate)
    return process.stdin, process.stdout


def train(
    directory: Path, *overrides: str, ranks: int = 1, resume: bool = False, fresh: bool = False
) -> list[dict[str, Any]]:
    """A run that must succeed, in `directory`; its rows."""
    if resume:
        arguments = ["train", "--resume", str(directory), *overrides]
    else:
        arguments = ["train", *MICRO, f"run_dir={directory}", *overrides]
    done = mispo(*arguments, cwd=directory.parent, ranks=ranks, fresh=fresh)
    assert done.returncode == 0, done.stderr[-3000:]
    return rows_of(directory)


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]
