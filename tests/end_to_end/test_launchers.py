"""torchrun, accelerate and deepspeed start the same run on two ranks; the right one of them says what went wrong."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.runs import MICRO, rows_of, without_times

MODULE, SCRIPT = ("-m", "mispo.cli"), (str(Path(sys.executable).with_name("mispo")),)
STEP = (*MICRO, "warm_start.steps=1", "rollout.max_new_tokens=16", "data.eval_size=2", "trainer.zero_stage=2")


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def launcher(name: str) -> list[str]:
    """The command before `train …`, with two ranks; a module or mispo's own script, and a free port for each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {
        "torchrun": [program("torchrun"), "--nproc-per-node", "2", "--master-port", port, *MODULE],
        "accelerate": [
            *(program("accelerate"), "launch", "--use_deepspeed", "--num_processes", "2"),
            *("--main_process_port", port, *MODULE),
        ],
        "deepspeed": [program("deepspeed"), "--num_gpus", "2", "--master_port", port, *SCRIPT],
    }[name]


def launch(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return subprocess.run(
        [*launcher(name), "train", *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def one_step(name: str, run: Path) -> tuple[list[dict[str, Any]], str]:
    """Rows of a run of one step, and what was on the screen."""
    done = launch(name, *STEP, "trainer.steps=1", f"run_dir={run}")
    assert done.returncode == 0, done.stderr[-3000:]
    return rows_of(run), done.stdout


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What torchrun's run measures."""
    return one_step("torchrun", tmp_path_factory.mktemp("torchrun") / "run")[0]


@pytest.mark.parametrize("name", ["accelerate", "deepspeed"])
def test_every_launcher_runs_the_same_step(expected: list[dict[str, Any]], tmp_path: Path, name: str) -> None:
    rows, said = one_step(name, tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1]
    assert without_times(rows) == without_times(expected)
    assert said.count("2 × cpu, trainer float32 ZeRO 2") == 1
    assert said.count("metrics    ") == 1


@pytest.mark.parametrize("name", ["torchrun", "accelerate", "deepspeed"])
def test_bad_input_is_told_once(name: str) -> None:
    done = launch(name, "trainer.stepps=1")
    assert done.returncode != 0
    assert done.stderr.count("error: trainer.stepps: no such key; did you mean trainer.steps?") == 1


def test_an_error_of_one_rank_is_told_by_that_rank(tmp_path: Path) -> None:
    """And not by the other one, which has only lost it."""
    run = tmp_path / "run"
    (run / "rollouts/step_1.rank1.parquet").mkdir(parents=True)
    done = launch("torchrun", *STEP, f"run_dir={run}")
    assert done.returncode == 1
    assert re.search(rf"rank 1: error: cannot write {run}/rollouts/step_1\.rank1\.parquet: .*directory", done.stderr)
    assert "another rank" not in done.stderr
    assert len(re.findall(r"^(rank \d+: )?error: ", done.stderr, re.M)) == 1
    assert "IsADirectoryError" in (run / "error.txt").read_text()
