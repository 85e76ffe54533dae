"""The part of trainer.py that compares with TRL: the model that both open, the turns, the table."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from load import Load, Measured, ragged
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from writing import table

from model.tokenizer import character_tokenizer

COMPLETIONS, MINIBATCHES = 64, 4

ROWS = (1, 2, 4)
"""Trajectories in TRL's micro-batches that are tried: at most four of the longest, as many tokens as mispo's may have.
The fastest is taken."""

Measure = Callable[[Load], dict[str, Measured]]


@dataclass(frozen=True)
class Turn:
    """One process of TRL and one of mispo: seconds of a step, median of the process's rounds."""

    trl: float
    mispo: float


def compare(measure: Measure, python: str, limit: int, prompt: int, dtype: str, rounds: int, repeats: int) -> str:
    """Ragged completions and equal ones, of at most `limit` tokens."""
    lengths = {"ragged": ragged(COMPLETIONS, limit), "equal": (limit // 2,) * COMPLETIONS}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        count = save_model(Path(folder), limit + prompt)
        for name, chosen in lengths.items():
            load = Load(
                lengths=chosen,
                tokens_per_microbatch=4 * (prompt + max(chosen)),
                model=folder,
                prompt=prompt,
                minibatches=MINIBATCHES,
                dtype=dtype,
                rounds=rounds,
            )
            rows.append([name, *row(load, measure, python, repeats)])
    return (
        f"Qwen3-MoE, {count / 1e6:.1f} M parameters (4 layers, hidden 128, 16 experts top-4), {COMPLETIONS} "
        f"completions of at most {limit} tokens in groups of 8, {MINIBATCHES} updates with AdamW, the same ids and "
        "rewards; from token ids to the last update. mispo: padded, micro-batches of the tokens of 4 of the longest. "
        f"TRL {version(python)}: the fastest of {', '.join(map(str, ROWS))} trajectories per micro-batch, no "
        f"checkpointing of layers. Median of {repeats} turns of {rounds} steps, ratio (lowest – highest). "
        "Target: ratio ≥ 2.\n\n"
        + table(
            ("lengths", "mean", "TRL per micro-batch", "TRL, tokens/s", "mispo, tokens/s", "ratio", "Δ log-prob"), rows
        )
    )


def row(load: Load, measure: Measure, python: str, repeats: int) -> list[str]:
    """A line of the table. The last cell: largest difference of a trajectory's mean old log-prob between the two."""
    tried = {rows: statistics.median(run_trl(replace(load, rounds=1), python, rows)[0]) for rows in ROWS}
    best = min(tried, key=tried.__getitem__)
    turns, gap = [], 0.0
    for _ in range(repeats):
        seconds, logprobs = run_trl(load, python, best)
        ours = measure(load)["padded"]
        turns.append(Turn(statistics.median(seconds), ours.median))
        gap = max(gap, *(abs(a - b) for a, b in zip(logprobs, ours.logprobs, strict=True)))
    ratios = [turn.trl / turn.mispo for turn in turns]
    speeds = [load.generated / statistics.median(side) for side in zip(*((t.trl, t.mispo) for t in turns), strict=True)]
    return [
        f"{load.generated / len(load.lengths):.0f}",
        str(best),
        *(f"{speed:,.0f}" for speed in speeds),
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})",
        f"{gap:.0e}",
    ]


def run_trl(load: Load, python: str, rows: int) -> tuple[list[float], list[float]]:
    """Seconds of each step, and mean old log-probs, of a process of its own. RuntimeError with its output."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [python, str(Path(__file__).with_name("trl_step.py")), str(out), load.dumps(), str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"TRL:\n{done.stderr[-3000:]}")
        found = json.loads(out.read_text())
    return found["seconds"], found["logprobs"]


def save_model(folder: Path, positions: int) -> int:
    """A small Qwen3-MoE with random weights and a tokenizer; returns how many parameters it has."""
    tokenizer = character_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def version(python: str) -> str:
    return subprocess.check_output([python, "-c", "import trl; print(trl.__version__)"], text=True).strip()
