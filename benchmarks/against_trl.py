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
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM
from writing import table

from model.build import build_policy
from model.tokenizer import character_tokenizer

COMPLETIONS, MINIBATCHES = 64, 4

ROWS = (1, 2, 4)
"""Trajectories in TRL's micro-batches that are tried: at most four of the longest, as many tokens as mispo's may have.
The fastest is taken, or the last without a try where there is one turn only."""


@dataclass(frozen=True)
class Shape:
    """Of the Qwen3-MoE that both open; the longest completion, tokens."""

    layers: int
    hidden: int
    heads: int
    experts: int
    top_k: int
    expert_ffn: int
    limit: int


SHAPES = {"small": Shape(4, 128, 4, 16, 4, 64, 256), "large": Shape(12, 1024, 16, 32, 4, 512, 2048)}
"""small: for a processor. large: for one GPU. Any other name is a preset of Step, limit as small."""

Measure = Callable[[Load], dict[str, Measured]]


@dataclass(frozen=True)
class Turn:
    """One process of TRL and one of mispo: seconds of a step, median of the process's rounds."""

    trl: float
    mispo: float


def compare(
    measure: Measure, python: str, name: str, limit: int, prompt: int, dtype: str, counts: tuple[int, int]
) -> str:
    """Ragged completions of at most `limit` tokens and equal ones of half of that. counts: rounds and turns."""
    rounds, turns = counts
    lengths = {"ragged": ragged(COMPLETIONS, limit), "equal": (limit // 2,) * COMPLETIONS}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        what = save_model(name, Path(folder), limit + prompt)
        for kind, chosen in lengths.items():
            load = Load(
                lengths=chosen,
                tokens_per_microbatch=max(ROWS) * (prompt + max(chosen)),
                model=folder,
                prompt=prompt,
                minibatches=MINIBATCHES,
                dtype=dtype,
                rounds=rounds,
            )
            rows.append([kind, *row(load, measure, python, turns)])
    fastest = f"the fastest of {', '.join(map(str, ROWS))}" if turns > 1 else str(ROWS[-1])
    return (
        f"{what}, {COMPLETIONS} completions of at most {limit} tokens in groups of 8, {MINIBATCHES} updates with "
        "AdamW, the same ids and rewards; from token ids to the last update. mispo: padded, micro-batches of the "
        f"tokens of {max(ROWS)} of the longest. TRL {version(python)}: {fastest} trajectories "
        f"per micro-batch, no checkpointing of layers. Median of {turns} turns of {rounds} steps, ratio "
        "(lowest – highest). Target: ratio ≥ 2.\n\n"
        + table(
            ("lengths", "mean", "TRL per micro-batch", "TRL, tokens/s", "mispo, tokens/s", "ratio", "Δ log-prob"), rows
        )
    )


def row(load: Load, measure: Measure, python: str, repeats: int) -> list[str]:
    """A line of the table. The last cell: largest difference of a trajectory's mean old log-prob between the two."""
    best = ROWS[-1]
    if repeats > 1:
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


def save_model(name: str, folder: Path, positions: int) -> str:
    """A policy with random weights and a tokenizer; returns what it is, in words."""
    if name in SHAPES:
        shape, tokenizer = SHAPES[name], character_tokenizer()
        torch.manual_seed(0)
        model: PreTrainedModel = Qwen3MoeForCausalLM(qwen3_moe(shape, tokenizer, positions))
        words = f"Qwen3-MoE ({shape.layers} layers, hidden {shape.hidden}, {shape.experts} experts top-{shape.top_k})"
    else:
        model, tokenizer = build_policy(name, None)
        words = f"Step, preset {name}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"{words}, {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters"


def qwen3_moe(shape: Shape, tokenizer: PreTrainedTokenizerBase, positions: int) -> Qwen3MoeConfig:
    """Its configuration."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2,
        head_dim=shape.hidden // shape.heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.expert_ffn,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def version(python: str) -> str:
    return subprocess.check_output([python, "-c", "import trl; print(trl.__version__)"], text=True).strip()
