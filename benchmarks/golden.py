"""Golden rows: small runs of every kind, and what differs between those of two commits.

    python benchmarks/golden.py run DIR [NAME …]      # trains what is missing in DIR, two runs at a time
    python benchmarks/golden.py compare OLD NEW       # exit status 1 if anything differs

A refactor that moves no number leaves metrics, sampled tokens and the tensors of all checkpoints bit for bit as they
were. Times, memory, state.json and config.yaml are left aside; a metric that only NEW has is no difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

SMALL = (
    "recipe=smoke",
    "tracking.wandb=disabled",
    "rollout.prompts_per_step=16",
    "rollout.samples_per_prompt=4",
    "warm_start.steps=60",
    "data.eval_size=16",
    "trainer.steps=4",
    "trainer.critic_minibatches=6",
    "checkpoint.every=2",
)

STALE = "rollout.lag=4"

RUNS: dict[str, tuple[str, ...]] = {
    "mispo": ("eval.every=2",),
    "stale": (STALE, "trainer.steps=6"),
    "quantile": ("algorithm=mispo_quantile", STALE),
    "metropolis": ("algorithm=mispo_metropolis", STALE),
    "random": ("algorithm=random_reject", STALE),
    "current": ("algorithm.mask_policy=current", STALE),
    "icepop": ("algorithm=icepop", "critic.pretrain_steps=1", "critic.warmup_steps=1"),
    "grpo": ("algorithm=grpo", "algorithm.kl=0.01"),
    "dapo": ("algorithm=dapo", "rollout.max_new_tokens=40"),
    "shared": ("critic=shared", "trainer.critic_minibatches=4"),
    "lora": ("model.lora.rank=4",),
    "replay": ("router.replay=rollout", "rollout.dtype=bf16", "rollout.parity_tolerance=1", "router.attribute_every=2"),
    "old_routing": ("router.replay=old", "router.bias_update_rate=0.001"),
    "muon": ("optimizer=muon", "model.mtp=1", "trainer.mtp_weight=0.1"),
    "zero2": ("trainer.zero_stage=2", STALE),
}
"""Name → overrides on top of SMALL; zero2 runs on two ranks. `resumed` continues mispo's second step under another
name."""

TIMES = ("timing_s/", "perf/max_memory_gb", "perf/t", "perf/mfu")


def main() -> None:
    match sys.argv[1:]:
        case ["run", directory, *names]:
            unknown = set(names) - RUNS.keys()
            if unknown:
                sys.exit(f"no run named {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
            train_all(Path(directory), names or [*RUNS, "resumed"])
        case ["compare", old, new]:
            differing = list(differences(Path(old), Path(new)))
            print("\n".join(differing) or "no difference")
            sys.exit(bool(differing))
        case _:
            sys.exit(__doc__)


def train_all(directory: Path, names: list[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as executor:
        list(executor.map(lambda name: train(directory, name), [name for name in names if name != "resumed"]))
    if "resumed" in names:
        resume(directory)


def train(directory: Path, name: str) -> None:
    target = directory / name
    if (target / "report.html").exists():
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if name == "zero2" else []
    mispo([*launcher, "-m", "mispo.cli", "train", *SMALL, *RUNS[name], f"run_dir={target}"], directory / f"{name}.log")


def resume(directory: Path) -> None:
    """The last two steps of `stale`'s like once more, from the checkpoint of step 2."""
    target = directory / "resumed"
    if (target / "report.html").exists():
        return
    log = directory / "resumed.log"
    mispo(["-m", "mispo.cli", "train", *SMALL, STALE, "trainer.steps=2", f"run_dir={target}"], log)
    mispo(["-m", "mispo.cli", "train", "--resume", str(target), "trainer.steps=4"], log)


def mispo(command: list[str], log: Path) -> None:
    with log.open("a") as output:
        done = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        sys.exit(f"a run failed, see {log}")


def differences(old: Path, new: Path) -> Iterator[str]:
    """One line for each thing that differs."""
    names = [path.parent.name for path in sorted(old.glob("*/metrics.jsonl"))]
    if not names:
        yield f"{old} holds no runs"
    for name in names:
        if not (new / name / "metrics.jsonl").exists():
            yield f"{name}: missing"
            continue
        found = [*_rows(old / name, new / name), *_tokens(old / name, new / name), *_tensors(old / name, new / name)]
        yield from (f"{name}: {line}" for line in found)


def _rows(old: Path, new: Path) -> Iterator[str]:
    before, after = ({row["step"]: row for row in _read(path / "metrics.jsonl")} for path in (old, new))
    for step in sorted(before.keys() | after.keys()):
        a, b = before.get(step, {}), after.get(step, {})
        for key in sorted(a):
            if not key.startswith(TIMES) and key in a and a[key] != b.get(key, "none"):
                yield f"step {step} {key}: {a[key]} → {b.get(key, 'none')}"


def _read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _tokens(old: Path, new: Path) -> Iterator[str]:
    for path in sorted(old.glob("rollouts/*.parquet")):
        other = new / "rollouts" / path.name
        if not other.exists():
            yield f"{path.name}: missing"
            continue
        before, after = pq.read_table(path), pq.read_table(other)
        for column in before.column_names:
            if column not in after.column_names:
                yield f"{path.name} {column}: missing"
            elif not before[column].equals(after[column]):
                yield f"{path.name} {column}: differs"


def _tensors(old: Path, new: Path) -> Iterator[str]:
    for path in sorted(old.glob("checkpoints/step_*/**/*.safetensors")):
        other = new / path.relative_to(old)
        where = path.relative_to(old / "checkpoints")
        if not other.exists():
            yield f"{where}: missing"
            continue
        before, after = load_file(path), load_file(other)
        if before.keys() != after.keys():
            yield f"{where}: other tensors ({', '.join(sorted(before.keys() ^ after.keys())[:3])})"
            continue
        for name, tensor in before.items():
            if not torch.equal(tensor, after[name]):
                gap = (tensor.double() - after[name].double()).abs().max().item()
                yield f"{where} {name}: largest difference {gap:.2g}"


if __name__ == "__main__":
    main()
