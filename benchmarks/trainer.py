"""What does the trainer do per second, and what does it need? Scoring and actor updates, without rollouts.

    python benchmarks/trainer.py [PART …] [--preset micro] [--tokens 16384] [--trl-python PATH] [--quick]

Parts, all by default: lengths (512 to 8192 tokens at the same number per step), layouts (padded against packed on
ragged lengths), zero (ZeRO stages on two ranks), trl (TRL's GRPOTrainer on the same model, batch and updates). The
vocabulary has its own: logprob.py. Each measurement is a process of its own, so that peaks of memory are its own;
threads as OMP_NUM_THREADS says. TRL may live in another environment (--trl-python: its interpreter). Learning rates
are 0: every step does the same work on the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from against_trl import SHAPES, compare
from load import Load, Measured, ragged
from writing import table, write_results

PROMPT = 16
"""Tokens of each prompt."""

LAYOUTS = ("padded", "packed")
"""Of trainer.layout, the first is what the others are compared with."""

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Sizes:
    """How much is measured. tokens: of a step, prompts included. limit: longest ragged trajectory, in tokens.
    zero_tokens: of a step of all ranks. repeats: processes of each side, against TRL."""

    lengths: tuple[int, ...]
    tokens: int
    limit: int
    zero_preset: str
    zero_tokens: int
    rounds: int
    repeats: int


NORMAL = Sizes((512, 1024, 2048, 4096, 8192), 16384, 1024, "small", 2048, rounds=2, repeats=3)
QUICK = Sizes((64, 128), 256, 64, "micro", 256, rounds=1, repeats=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--preset", default="micro", help="Step shape for lengths and layouts")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention", default="sdpa", help="for lengths and layouts")
    parser.add_argument("--optimizer", default="adamw", help="but for trl: that has AdamW on both sides")
    parser.add_argument("--tokens", type=int, help="of a step, for lengths and layouts")
    parser.add_argument("--limit", type=int, help="longest trajectory of layouts, tokens")
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--trl-shape", default="small", help=f"{', '.join(SHAPES)}, or a preset of Step")
    parser.add_argument("--repeats", type=int, help="processes of each side, for trl")
    parser.add_argument("--quick", action="store_true", help="smallest sizes: to see that it runs")
    parser.add_argument("--page", default="trainer", help="name of the page in benchmarks/results")
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    sizes = QUICK if options.quick else NORMAL
    given = {key: getattr(options, key) for key in ("tokens", "limit", "repeats") if getattr(options, key)}
    sizes = replace(sizes, **given)
    sections = []
    for name in options.parts or PARTS:
        sections.append(PARTS[name](options, sizes))
        sys.stdout.write(f"{sections[-1]}\n\n")
        sys.stdout.flush()
    body = (
        "Generated tokens of a step ÷ seconds of scoring (old log-probs) and actor updates; no rollouts, no critic. "
        "FLOPs are the model's (model/facts.py), no padding and no recomputation counted. A vocabulary of "
        "128,896 is measured by logprob.py.\n\n" + "\n\n".join(sections)
    )
    threads = int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads())
    sys.stdout.write(f"{write_results(options.page, 'The trainer', body, threads)}\n")


def lengths(options: argparse.Namespace, sizes: Sizes) -> str:
    """One process for each length."""
    rows = []
    for length in sizes.lengths:
        load = Load(
            lengths=(length - PROMPT,) * (sizes.tokens // length),
            tokens_per_microbatch=max(sizes.lengths),
            preset=options.preset,
            prompt=PROMPT,
            samples_per_prompt=2,
            dtype=options.dtype,
            attention=options.attention,
            optimizer=options.optimizer,
            rounds=sizes.rounds,
        )
        found = measure(load)["padded"]
        rows.append([f"{length:,}", str(len(load.lengths)), *speeds(load, found), f"{found.peak_mib:,.0f}"])
    return (
        f"## By length\n\nPreset {options.preset}, {sizes.tokens:,} tokens per step in one update, micro-batches of "
        f"{max(sizes.lengths):,}; median of {sizes.rounds} steps. Peak memory: how far it rises within a step.\n\n"
        + table(("length", "trajectories", *SPEEDS, "peak MiB"), rows)
    )


def layouts(options: argparse.Namespace, sizes: Sizes) -> str:
    """All in one process, in turns."""
    drawn = ragged(max(8, 2 * sizes.tokens // sizes.limit), sizes.limit - PROMPT)
    load = Load(
        lengths=drawn,
        tokens_per_microbatch=4 * sizes.limit,
        preset=options.preset,
        prompt=PROMPT,
        minibatches=4,
        layouts=LAYOUTS,
        dtype=options.dtype,
        attention=options.attention,
        optimizer=options.optimizer,
        rounds=2 * sizes.rounds,
    )
    found = measure(load)
    base = found[LAYOUTS[0]]
    rows = [
        [name, *speeds(load, one), ratio(pairs(base.seconds, one.seconds)), f"{one.peak_mib:,.0f}"]
        for name, one in found.items()
    ]
    gap = max(abs(a - b) for one in found.values() for a, b in zip(base.logprobs, one.logprobs, strict=True))
    return (
        f"## By layout\n\nPreset {options.preset}, {options.attention}, {len(drawn)} trajectories, log-normal, mean "
        f"{load.generated / len(drawn):.0f} and at most {max(drawn)} generated tokens, micro-batches of "
        f"{load.tokens_per_microbatch:,}, 4 updates; ratio to {LAYOUTS[0]} over {load.rounds} pairs of steps in one "
        f"process: median (lowest – highest). Largest difference of a trajectory's mean log-prob: {gap:.0e}.\n\n"
        + table(("layout", *SPEEDS, "ratio", "peak MiB"), rows)
    )


def zero(options: argparse.Namespace, sizes: Sizes) -> str:
    """Two ranks: gloo on CPU; needs two cards where there are cards."""
    title = "## ZeRO stages, two ranks\n\n"
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        return title + "Left out: this machine has one card."
    limit = min(sizes.limit, 256)
    load = Load(
        lengths=(limit - PROMPT,) * (sizes.zero_tokens // limit),
        tokens_per_microbatch=4 * limit,
        preset=sizes.zero_preset,
        prompt=PROMPT,
        samples_per_prompt=2,
        ranks=2,
        dtype=options.dtype,
        optimizer=options.optimizer,
        rounds=sizes.rounds,
    )
    found = {stage: measure(replace(load, zero_stage=stage))["padded"] for stage in STAGES}
    base = found[STAGES[0]]
    rows = [
        [
            str(stage),
            f"{load.generated / one.median:,.0f}",
            f"{base.median / one.median:.2f}",
            f"{one.states_mib:,.0f}",
            f"{one.states_mib + one.peak_mib:,.0f}",
        ]
        for stage, one in found.items()
    ]
    return (
        f"{title}Preset {sizes.zero_preset} ({base.parameters / 1e6:.0f} M parameters), {options.optimizer}, "
        f"{sizes.zero_tokens:,} tokens per step in one update; median of {sizes.rounds} steps. Memory of rank 0 since "
        "before the model was built: between steps (weights, gradients, optimizer), and at the peak of a step.\n\n"
        + table(("stage", "tokens/s", "to stage 0", "MiB between", "MiB at peak"), rows)
    )


def trl(options: argparse.Namespace, sizes: Sizes) -> str:
    """TRL in its own interpreter, both in processes of their own, in turns."""
    title = "## Against TRL\n\n"
    if subprocess.run([options.trl_python, "-c", "import trl"], capture_output=True, check=False).returncode:
        return title + f"Left out: TRL does not import in {Path(options.trl_python).name}; give --trl-python."
    limit = sizes.limit if options.quick else SHAPES.get(options.trl_shape, SHAPES["small"]).limit
    counts = (sizes.rounds, sizes.repeats)
    return title + compare(measure, options.trl_python, options.trl_shape, limit, PROMPT, options.dtype, counts)


PARTS: dict[str, Callable[[argparse.Namespace, Sizes], str]] = {
    "lengths": lengths,
    "layouts": layouts,
    "zero": zero,
    "trl": trl,
}

SPEEDS = ("tokens/s", "scoring", "update", "GFLOP/s", "MFU")


def speeds(load: Load, found: Measured) -> list[str]:
    """Tokens per second of the step and of its two halves, FLOPs per second, share of the card's bf16 peak."""
    rate = (found.score_flops + found.update_flops) / found.median
    halves = (found.median, statistics.median(found.score_s), statistics.median(found.update_s))
    mfu = f"{rate / found.card_flops:.1%}" if found.card_flops else "card unknown" if torch.cuda.is_available() else "–"
    return [*(f"{load.generated / seconds:,.0f}" for seconds in halves), f"{rate / 1e9:,.1f}", mfu]


def pairs(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times as fast the other one is, step by step."""
    return [a / b for a, b in zip(base, other, strict=True)]


def ratio(values: Sequence[float]) -> str:
    """Median and spread."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} – {max(values):.2f})"


def measure(load: Load) -> dict[str, Measured]:
    """training.py in its own process or processes; what it found for each layout. RuntimeError with its output."""
    launcher = [sys.executable]
    if load.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(load.ranks)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        run([*launcher, str(Path(__file__).with_name("training.py")), str(out), load.dumps()])
        return {name: Measured(**values) for name, values in json.loads(out.read_text()).items()}


def run(command: Sequence[str]) -> None:
    """To its end. RuntimeError with the last lines that it wrote if it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[-2]}\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    main()
