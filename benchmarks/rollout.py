"""How fast is the native engine against transformers' generate, on the tiny model?

    python benchmarks/rollout.py [--repeats 3]

Two loads, both engines in turn within one run, so that the ratio does not depend on the machine's mood:
- uniform: 64 prompts, all of them sampled for 256 tokens. No refilling, no early end: pure decoding.
- ragged: 256 prompts whose completions end after 8 to 256 tokens (most of them early), 64 at a time. `generate`
  decodes four batches of 64, each as long as its longest; the native engine refills free slots.
Both use the same weights, the same grouped experts and temperature 1; the native engine also records log-probs
and routing confidence, `generate` records nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from writing import table, write_results

from model.build import build_policy
from rollouts.engine import Request, run_all
from rollouts.native.engine import NativeEngine

SLOTS, LONGEST, PROMPT = 64, 256, 16
NEVER = 10**6
"""An end token that no vocabulary has: lengths are set by the limits alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    policy, tokenizer = build_policy("tiny", None)
    policy.eval()
    policy.generation_config.eos_token_id = None
    engine = NativeEngine(policy, [NEVER], tokenizer.pad_token_id, SLOTS)
    rows = []
    for name, lengths in (("uniform", [LONGEST] * SLOTS), ("ragged", ragged_lengths(4 * SLOTS))):
        prompts = torch.randint(7, 100, (len(lengths), PROMPT), generator=torch.Generator().manual_seed(0))

        def native(prompts: torch.Tensor = prompts, lengths: list[int] = lengths) -> None:
            requests = [
                Request(ids, 1 + n, length, 1.0) for n, (ids, length) in enumerate(zip(prompts, lengths, strict=True))
            ]
            samples = run_all(engine, requests)
            assert [len(sample.completion_ids) for sample in samples] == lengths

        def generate(prompts: torch.Tensor = prompts, lengths: list[int] = lengths) -> None:
            for start in range(0, len(lengths), SLOTS):
                part = prompts[start : start + SLOTS]
                longest = max(lengths[start : start + SLOTS])
                with torch.inference_mode():
                    out = policy.generate(
                        part, attention_mask=torch.ones_like(part), max_new_tokens=longest, do_sample=True, top_k=0
                    )
                assert out.shape[1] == PROMPT + longest

        ours, theirs = in_turn(native, generate, repeats)
        tokens = sum(lengths)
        rows.append(
            [
                name,
                f"{len(lengths)} × {min(lengths)}–{max(lengths)}",
                f"{tokens / ours:,.0f}",
                f"{tokens / theirs:,.0f}",
                f"{theirs / ours:.2f}",
            ]
        )
    header = ("load", "completions × tokens", "native, tokens/s", "generate, tokens/s", "ratio")
    body = (
        f"Median of {repeats} turns after a warm-up; useful tokens (those within each completion's limit). "
        "Target for the uniform load: ratio ≥ 1.3.\n\n" + table(header, rows)
    )
    sys.stdout.write(
        f"{write_results('rollout', 'Rollout: native engine against generate', body, torch.get_num_threads())}\n"
    )


def ragged_lengths(count: int) -> list[int]:
    """A long tail: half below 40 tokens, the longest at the limit."""
    generator = torch.Generator().manual_seed(1)
    draws = torch.empty(count).exponential_(1 / 60, generator=generator).clamp(8, LONGEST).long()
    return [int(draw) for draw in draws]


def in_turn(a: Callable[[], None], b: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median seconds of both, measured alternately."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for measured, function in zip(seconds, (a, b), strict=True):
            start = time.perf_counter()
            function()
            if turn:
                measured.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    main()
