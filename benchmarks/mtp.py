"""How many drafted tokens would a decoder accept? Heads that learnt in a warm start, against the model's greedy text.

    python benchmarks/mtp.py [--steps 200] [--prompts 128]

The quickstart's model with three draft heads (model.mtp=3), warm-started. Each head guesses from the true tokens
before its own, which is what a decoder gives it as long as the guesses of the heads before it were right; so one
forward over a finished text shows what decoding step by step would have accepted.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from writing import table, write_results

from mispo.config.load import load_config
from mispo.data.prompts import build_data
from mispo.warm_start.traces import careful_opening
from mispo.warm_start.train import warm_start
from model.build import build_policy
from model.step.step import StepForCausalLM
from rollouts.engine import Request, run_all
from rollouts.native.engine import NativeEngine

HEADS = 3
MAX_NEW_TOKENS = 96


@dataclass
class Count:
    """Of one head: tokens that it guessed, guesses that were right, and those after right ones of all heads before."""

    guesses: int = 0
    right: int = 0
    accepted: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=128)
    options = parser.parse_args()
    sizes = [f"warm_start.steps={options.steps}", f"data.eval_size={options.prompts}"]
    config = load_config(["recipe=quickstart", f"model.mtp={HEADS}", *sizes])
    model, tokenizer = build_policy(config.model.preset, None, mtp=HEADS)
    assert isinstance(model, StepForCausalLM)
    data = build_data(config.data, tokenizer)
    losses: list[float] = []
    warm_start(
        model,
        tokenizer,
        data.stream,
        config.warm_start,
        task=config.data.task,
        seed=0,
        on_step=lambda step, loss: losses.append(loss),
    )
    engine = NativeEngine(model.eval(), [tokenizer.eos_token_id], tokenizer.pad_token_id, 64)
    openings = [careful_opening(str(config.data.task), prompt.row) for prompt in data.heldout]
    starts = {
        "as it likes": [prompt.ids for prompt in data.heldout],
        "made to think": [
            torch.cat([prompt.ids, torch.tensor(tokenizer(opening, add_special_tokens=False).input_ids)])
            for prompt, opening in zip(data.heldout, openings, strict=True)
        ],
    }
    rows = []
    for name, prompts in starts.items():
        requests = [Request(ids, n, MAX_NEW_TOKENS, 0.0) for n, ids in enumerate(prompts)]
        completions = [sample.completion_ids for sample in run_all(engine, requests)]
        counts, forwards = accepted_drafts(model, prompts, completions)
        tokens = sum(map(len, completions))
        cells = [f"{count.right / count.guesses:.1%} / {count.accepted / count.guesses:.1%}" for count in counts]
        rows.append([name, f"{tokens:,}", *cells, f"{tokens / forwards:.2f}"])
    heads = [f"head {i}: right / accepted" for i in range(HEADS)]
    body = (
        f"The quickstart's model, {options.steps} steps of warm start (loss {losses[-1]:.3f}, weight of the heads "
        f"{config.warm_start.mtp_weight:g}), {options.prompts} held-out prompts, greedy, at most {MAX_NEW_TOKENS} "
        "tokens. Head i guesses the token i + 2 places on, where the text has one; accepted: the heads before it were "
        "right too. Tokens per forward: what a decoder with all heads would gain, 1 without any.\n\n"
        + table(("text", "tokens", *heads, "tokens per forward"), rows)
    )
    sys.stdout.write(f"{write_results('mtp', 'Draft heads: accepted tokens', body, torch.get_num_threads())}\n")


@torch.no_grad()
def accepted_drafts(
    model: StepForCausalLM, prompts: list[Tensor], completions: list[Tensor]
) -> tuple[list[Count], int]:
    """Counts by head over all texts, and the forwards that decoding them with the heads would take."""
    counts, forwards = [Count() for _ in range(HEADS)], 0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.cat([prompt, completion])
        _, drafts = model.draft(ids[None])
        first, last = len(prompt) - 1, len(ids) - 1  # a forward at t gives token t+1 and drafts of those after it
        right = [(logits[0, :-1].argmax(-1) == ids[i + 2 :]).tolist() for i, logits in enumerate(drafts)]
        runs = []
        for t in range(first, last):
            known = [right[i][t] for i in range(HEADS) if t + 2 + i <= last]
            run = [*known, False].index(False)
            runs.append(run)
            for i, hit in enumerate(known):
                counts[i].guesses += 1
                counts[i].right += hit
                counts[i].accepted += i < run
        t = 0
        while t < len(runs):
            t += 1 + runs[t]
            forwards += 1
    return counts, forwards


if __name__ == "__main__":
    main()
